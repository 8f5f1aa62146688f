"""Mistakes planted in a module's source, to show that a test sees them."""

import inspect
from types import ModuleType


def planted(module: ModuleType, right: str, wrong: str) -> ModuleType:
    """A copy of a module in which one piece of the text is another.

    Raises AssertionError if the text does not have that piece exactly once.
    """
    source = inspect.getsource(module)
    assert source.count(right) == 1, f"{module.__name__} has {right!r} {source.count(right)} times"
    made = ModuleType(module.__name__)
    made.__file__ = module.__file__
    exec(compile(source.replace(right, wrong), str(module.__file__), "exec"), made.__dict__)
    return made
