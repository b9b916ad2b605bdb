"""Which tests a marker expression selects."""

from _pytest.mark.expression import Expression


def asks_for_gpu(markers: str) -> bool:
    """Whether an expression given to ``-m`` selects tests by the marker ``cuda``."""
    if not markers:
        return False
    selected = Expression.compile(markers)
    return selected.evaluate(lambda name, **_: name == "cuda") and not selected.evaluate(
        lambda name, **_: False
    )
