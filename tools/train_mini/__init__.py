"""Train the mini text-to-video model that hyq-search ships, and the mini judge that scores it.

`python -m tools.train_mini` runs every stage in order, resuming what was interrupted; `--help` lists the stages. Read
`domain.py` (what the videos show) and `codec.py` (the fixed latent space) first: everything else is trained on those
two.
"""
