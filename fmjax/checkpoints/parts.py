"""Parts of a checkpoint: one read alone, without what made it, and those that fit another model or another optimiser.

A part is named by its leaves' keys joined by dots, as errors name them: "ema", "ema.0" of several averages, "params.params.Dense_0".
"""

import difflib
import re
import warnings
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import jax
import jax.numpy as jnp

from fmjax.checkpoints.folders import is_checkpoint, steps_in
from fmjax.checkpoints.leaves import describe
from fmjax.checkpoints.store import CorruptCheckpoint, exactly, fits, index_of, read, say

PLACE = re.compile(r"((\d+|inner_state|inner_opt_state)\.)*")
"""Where in a chain, and within what that wraps it, a state of an optimiser is."""
TIED = ("count", "mu", "nu", "v", "v_row", "v_col")
"""Fields of a state that go together: Adam divides its moments by what their count says that they have gathered."""


def restore_part(folder, part, like=None) -> Any:
    """Reads a part of a checkpoint alone: what is sampled, without the optimiser's state and what made it.

    Args:
      folder: what `save` wrote, or a `Checkpointer`'s folder, of which the last whole checkpoint is read.
      part: its name: "ema" for the average of a `TrainState`, "ema.0" for the first of several, "params", "variables", or any leaf.
      like: as for `restore`, of this part alone; by default the part comes as nested dicts, as Linen's parameters are, whose keys are
        strings, with arrays on the default device. NNX's states need it.
    Returns:
      The part: a pytree like `like`, or nested dicts of arrays.
    Raises:
      FileNotFoundError: if there is no checkpoint at the folder.
      CorruptCheckpoint: if any file of it, or of all of a `Checkpointer`'s, is not as it was written; one before the last is used with a
        warning.
      ValueError: if it has no such part, or one of another structure than `like`.
      MemoryError: if a device cannot hold it.
    """
    _check_part(part)

    def choose(folder, saved, wanted):
        inside = _inside(folder, saved, part)
        different = [name for name in inside | wanted if not fits(name, inside.get(name), wanted.get(name))]
        if different:
            more = f", and {len(different) - 3} more leaves differ" if len(different) > 3 else ""
            raise ValueError(
                f"{part} of the checkpoint at {folder} is of another structure: {'; '.join(say(n, inside, wanted) for n in different[:3])}"
                f"{more}. Give like as it was saved, or leave it out; checkpoints.restore_matching takes over what fits."
            )
        return {name: _join(part, name) for name in wanted}

    def one(folder):
        if like is not None:
            return read(folder, like, choose)[0]
        index = index_of(folder)
        inside = _inside(folder, index["leaves"], part)
        plain = index["plain"]
        return read(folder, _nested({name: plain.get(_join(part, name), _shape(kind)) for name, kind in inside.items()}), choose)[0]

    return _of_last(folder, one)


def restore_matching(folder, like, *, part="", new=(), unused=()) -> Any:
    """Reads into a pytree what a checkpoint has for it: a model of more classes or channels begins from one that was trained.

    Every leaf of `like` that the checkpoint has not, or has in another shape or dtype, is under a name in `new`; every leaf of the
    checkpoint that `like` has not is under one in `unused`. An error lists the names that are missing, and the call to make.

        params = checkpoints.restore_matching(folder, params, part="ema", new=("params.LabelEmbedding_0",))
        run = training.Run(training.init(params, optimizer), key)

    Args:
      folder: what `save` wrote, or a `Checkpointer`'s folder, of which the last whole checkpoint is read.
      like: the pytree to fill, of arrays; those that are restored may be `jax.ShapeDtypeStruct`s, as for `restore`.
      part: the part of the checkpoint that fills it, as for `restore_part`; by default all of it.
      new: names of leaves, or of what they are in, that keep the values of `like`, as errors name them.
      unused: names, within the part, of what is left in the checkpoint.
    Returns:
      A pytree like `like`; a warning says what is new in it and what was left.
    Raises:
      FileNotFoundError, CorruptCheckpoint, MemoryError: as `restore_part`.
      TypeError: if `new` or `unused` are no tuples or lists of names.
      ValueError: if a leaf differs and is not named, or a name is of no leaf that it could be of.
    """
    if part:
        _check_part(part)
    for argument, names in (("new", new), ("unused", unused)):
        if not isinstance(names, tuple | list | set | frozenset) or not all(isinstance(name, str) for name in names):
            raise TypeError(f"{argument} is {names!r}, but it is a tuple of names of leaves, such as ('params.LabelEmbedding_0',).")
    said = []

    def choose(folder, saved, wanted):
        inside = _inside(folder, saved, part) if part else saved
        kept = [name for name in wanted if _under(name, new)]
        left = [name for name in inside if name not in wanted]
        differ = [name for name in wanted if name not in kept and not fits(name, inside.get(name), wanted[name])]
        more = [name for name in left if not _under(name, unused)]
        misspelt = [_misspelt("new", name, wanted, "like") for name in new if not any(_under(leaf, [name]) for leaf in wanted)]
        misspelt += [
            _misspelt("unused", name, left, "what like has not") for name in unused if not any(_under(leaf, [name]) for leaf in left)
        ]
        if differ or more or misspelt:
            call = {"part": repr(part)} if part else {}
            call["new"] = _tuple(_cover([*kept, *differ], wanted))
            call["unused"] = _tuple(_cover([name for name in left if name in more or _under(name, unused)], inside))
            lines = [*misspelt, *(f"{say(name, inside, wanted)}." for name in [*differ, *more])]
            arguments = ", ".join(f"{name}={value}" for name, value in call.items() if value != "()")
            raise ValueError(
                f"The checkpoint at {folder} does not fill like, and what differs is not named:\n  "
                + "\n  ".join(lines)
                + f"\nIf this is meant, the call is checkpoints.restore_matching(folder, like, {arguments})."
            )
        for name in kept:
            if isinstance(wanted[name], jax.ShapeDtypeStruct):
                raise ValueError(f"{name} is new, so it keeps the value of like, but that is a shape alone: give an array.")
        said[:] = [_what("new", kept, wanted), _what("left in the checkpoint", left, inside)]
        return {name: None if name in kept else _join(part, name) for name in wanted}

    restored = _of_last(folder, lambda folder: read(folder, like, choose)[0])
    if any(said):
        warnings.warn(f"Of the checkpoint at {folder}: {', and '.join(filter(None, said))}.", stacklevel=2)
    return restored


def for_optimizer(said):
    """A choice, for `read`, of a state's leaves with another optimiser's state; what is new of it is said in a list."""

    def choose(folder, saved, wanted):
        there, here = ({name: leaf for name, leaf in leaves.items() if _under(name, ["opt_state"])} for leaves in (saved, wanted))
        rest = exactly(folder, *({name: each[name] for name in each if name not in of} for each, of in ((saved, there), (wanted, here))))
        found = _by_place(there, {name: describe(name, leaf) for name, leaf in here.items()})
        new, left = [name for name in here if found[name] is None], [name for name in there if name not in found.values()]
        # Down to the fields of the states, such as opt_state.0.mu.
        parts = [_what("new", new, here, 3), _what("left in the checkpoint", left, there, 3)]
        whole = f"Of the optimiser's state {', and '.join(filter(None, parts))}; the rest of the run is as it was saved."
        said[:] = [whole] if any(parts) else []
        return {name: found[name] if name in here else rest[name] for name in wanted}

    return choose


def _by_place(there, here):
    """The names of an optimiser's leaves there for those here: of the state with the same leaves, whatever its place in a chain, or, where
    there is none, of that with the most leaves of the same name and kind."""
    saved, wanted = _states(there), _states(here)
    pairs, left = {}, list(saved)
    for place, leaves in wanted.items():
        same = [other for other in left if saved[other] == leaves]
        if same:
            # The same place first, then the order.
            pairs[place] = place if place in same else same[0]
            left.remove(pairs[place])
    for place, leaves in wanted.items():
        if place not in pairs:
            shared = {other: len(leaves.items() & saved[other].items()) for other in [*left, *(each for each in saved if each not in left)]}
            most = max(shared.values(), default=0)
            found = [other for other in shared if shared[other] == most]
            if most and (len(found) == 1 or found[0] in left):
                pairs[place] = found[0]
                left = [other for other in left if other != found[0]]
    found = {}
    for place, leaves in wanted.items():
        other = pairs.get(place)
        carried = {name for name, kind in leaves.items() if other is not None and saved[other].get(name) == kind}
        # What `optax.inject_hyperparams` holds is what another optimiser is made for.
        carried = {name for name in carried if name.partition(".")[0] != "hyperparams"}
        tied = {name for name in leaves if name.partition(".")[0] in TIED}
        carried -= set() if tied <= carried else tied
        found |= {f"opt_state.{place}{name}": f"opt_state.{other}{name}" if name in carried else None for name in leaves}
    return found


def _states(leaves):
    """The states of a chain by their place, each its leaves' kinds by name."""
    states: dict[str, dict[str, str]] = {}
    for name, kind in leaves.items():
        name = name.partition(".")[2]
        place = PLACE.match(name).group()  # pyright: ignore[reportOptionalMemberAccess]
        states.setdefault(place, {})[name[len(place) :]] = kind
    return states


def _of_last(folder, one):
    """What a function of a checkpoint's folder gives for this one, or for the last whole one in it."""
    folder = Path(folder).absolute()
    steps = steps_in(folder)
    if is_checkpoint(folder) or not steps:
        return one(folder)
    for step in reversed(steps):
        try:
            return one(folder / str(step))
        except (FileNotFoundError, CorruptCheckpoint) as error:
            # A training may have removed it meanwhile.
            if steps_in(folder)[-1:] != steps[-1:]:
                return _of_last(folder, one)
            if step == steps[0]:
                raise
            warnings.warn(f"{error} The one before it is used.", stacklevel=4)
    raise AssertionError


def _check_part(part):
    if not isinstance(part, str) or not part:
        raise TypeError(f"part is {part!r}, but it is the name of a part, such as 'ema' or 'params'.")


def _inside(folder, saved, part):
    """The kinds of the leaves of a part by their names in it."""
    inside = {name[len(part) + 1 :]: kind for name, kind in saved.items() if _under(name, [part])}
    if not inside:
        top = list(dict.fromkeys(name.partition(".")[0] for name in saved))
        close = difflib.get_close_matches(part, _prefixes(saved), 1)
        raise ValueError(
            f"The checkpoint at {folder} has no {part!r}: its parts are {', '.join(top)}{f'; did you mean {close[0]!r}?' if close else '.'}"
        )
    return inside


def _under(name, names):
    """Whether a leaf is one of those named, or in one of them."""
    return any(name == each or name.startswith(f"{each}.") for each in names)


def _join(part, name):
    return ".".join(filter(None, (part, name)))


def _prefixes(names, least=1):
    """All names of at least so many keys that leaves are under, and their own."""
    keys = [name.split(".") for name in names]
    return list(dict.fromkeys(".".join(each[:n]) for each in keys for n in range(min(least, len(each)), len(each) + 1)))


def _cover(names, everything, least=1):
    """The fewest names that these leaves are under, and no others of them all."""
    found = []
    for prefix in _prefixes(names, least):
        if not _under(prefix, found) and all(leaf in names for leaf in everything if _under(leaf, [prefix])):
            found.append(prefix)
    return found


def _misspelt(argument, name, leaves, where):
    close = difflib.get_close_matches(name, _prefixes(leaves), 1)
    return f"{argument} has {name!r}, which no leaf of {where} is under{f': did you mean {close[0]!r}?' if close else '.'}"


def _what(is_, names, everything, least=1):
    """The names that leaves are under, for a warning."""
    covered = _cover(names, everything, least)
    more = f" and {len(covered) - 10} more" if len(covered) > 10 else ""
    return f"{', '.join(covered[:10])}{more} {'is' if len(covered) == 1 else 'are'} {is_}" if covered else ""


def _tuple(names):
    return f"({', '.join(map(repr, names))}{',' if len(names) == 1 else ''})"


def _shape(kind):
    """An abstract leaf of a kind that `describe` gave."""
    dtype, _, shape = kind.partition("[")
    shape = tuple(int(size) for size in shape.rstrip("]").split(",") if size.strip())
    if dtype.startswith("key<"):
        keys = [jax.eval_shape(lambda impl=impl: jax.random.key(0, impl=impl)) for impl in ("threefry2x32", "rbg", "unsafe_rbg")]
        return jax.ShapeDtypeStruct(shape, next(key.dtype for key in keys if str(key.dtype) == dtype))
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))


def _nested(leaves):
    """Leaves by name as nested dicts, or the leaf that has no name."""
    if list(leaves) == [""]:
        return leaves[""]
    nested: dict[str, Any] = {}
    for name, leaf in leaves.items():
        *keys, last = (unquote(key) for key in name.split("."))
        inner = nested
        for key in keys:
            inner = inner.setdefault(key, {})
        inner[last] = leaf
    return nested
