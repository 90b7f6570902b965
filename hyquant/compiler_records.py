"""What torch's compiler keeps of every compilation of a process although nobody asks for it again, and forgetting it.

A search compiles one quantization after another, for days. Each compilation leaves up to two megabytes: serialized
graphs to be saved for another process, generated sources for tracebacks, timings, and caches of symbolic shapes that
are keyed by the shapes of one compilation. None of it is needed to run what is compiled. The names are torch's own, of
2.14 (below each module), and what another version does not have is passed over.
"""

import linecache
import sys
from collections.abc import Callable, Iterator
from operator import attrgetter
from typing import Any

_RECORDS = (
    ("torch.compiler._cache", "CacheArtifactManager.clear"),
    ("torch._dynamo.eval_frame", "cached_backends.clear"),
    ("torch._dynamo.utils", "clear_compilation_metrics"),
    ("torch._inductor.codecache", "PyCodeCache.cache_clear"),
    ("torch._inductor.codecache", "PyCodeCache.linemaps.clear"),
    ("torch.fx.graph_module", "_loader.eval_cache.clear"),
)
"""By module, what empties a table of records."""

_GENERATED_SOURCE = "<eval_with_key>"
_GENERATED_MODULE = "torch._inductor.runtime.compile_tasks."


def forget_compilations() -> None:
    """Drop the records of all compilations so far; what was compiled runs on."""
    for module, path in _RECORDS:
        _call(module, path)
    for clear in _caches_of_shapes():
        clear()
    # A context of metrics notes where each was set, and is used again by every compilation of its thread.
    if (context := _call("torch._dynamo.utils", "get_metrics_context")) is not None:
        getattr(context, "_edits", []).clear()
    tables: tuple[tuple[dict[str, Any], str], ...] = (
        (linecache.cache, _GENERATED_SOURCE),
        (sys.modules, _GENERATED_MODULE),
    )
    for table, beginning in tables:
        for name in [name for name in table if name.startswith(beginning)]:
            table.pop(name, None)


def _call(module: str, path: str) -> Any:
    """Call a function of a module that is imported already; None without it."""
    try:
        return attrgetter(path)(sys.modules[module])()
    except (KeyError, AttributeError):
        return None


def _caches_of_shapes() -> Iterator[Callable[[], None]]:
    """Yield what empties the caches of the methods of `ShapeEnv`, which hold every one that was ever asked."""
    shapes = getattr(sys.modules.get("torch.fx.experimental.symbolic_shapes"), "ShapeEnv", object)
    for method in list(vars(shapes).values()):
        if callable(clear := getattr(method, "cache_clear", None)):
            yield clear
