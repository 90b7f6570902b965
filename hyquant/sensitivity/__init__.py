"""How much the denoiser's output suffers from each of its Linears alone, and what follows for a search.

`bands` says what is quantized together in one probe: the Linears of one kind, in one block or a few adjacent ones.
`probe` measures, with one band quantized and the rest in float on the inputs of a float rendering; `prefix` runs a
denoiser behind blocks whose outputs were kept, and `cost` counts the forwards that this takes. The result is a
`SensitivityMap` (`map`), from which `ladder` makes nested exclusion sets. `files` writes probes as they are done.
"""
