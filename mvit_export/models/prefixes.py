"""Names of weights in a checkpoint, matched with a network's: what wrappers put before them is taken off, and said."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping

from torch import Tensor

from mvit_export.errors import WeightsError
from mvit_export.models.entries import Entry, describe, pick

COUNTER = "num_batches_tracked"  # of BatchNorm: has no influence, and is absent from some files
# Modules that DataParallel, torch.compile, FSDP and activation checkpointing put around others, at any depth.
WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
UNNAMED = ("n_averaged",)  # beside the network in torch's AveragedModel
LORA = re.compile(r"(?:^|[._])(?:lora_(?:A|B|up|down|embedding_A|embedding_B)|hada_w[12]_[ab]|lokr_w[12])(?:\.|$)")


def align(state: Mapping[str, Tensor], expected: Iterable[str], ema: bool | None = True) -> Entry:
    """The tensors of `state` under a network's names, which `expected` are, where they have them but for a prefix.

    The names stay as they are if they fit, or if nothing does; the network's own check then says what is wrong. `ema`
    as in `find_entry`. Raises WeightsError for a LoRA, and for several networks side by side.
    """
    known = set(expected)
    needed = {key for key in known if not key.endswith(COUNTER)}
    if needed <= state.keys() <= known:
        return Entry(dict(state))
    refuse_lora(state, known)
    groups = group(state, known)
    whole = [prefix for prefix, names in groups.items() if needed <= names.keys()]
    candidates = whole or best_of(groups, len(needed))
    prefix, averaged = pick(candidates, ema, usual=("",))
    names = groups.get(prefix, {})
    others = [other for other in candidates if other != prefix]
    taken = {key for other in (prefix, *others) for key in groups.get(other, {}).values()}
    rest = [key for key in state if key not in taken]
    beside = [key for key in rest if key in UNNAMED or (prefix and not bare(key).startswith(f"{prefix}."))]
    outside = beside if whole else []
    tensors = {name: state[key] for name, key in names.items()} | {k: state[k] for k in rest if k not in outside}
    notes = (
        [describe(f"{prefix}.*" if prefix else "the network", averaged, [f"{o}.*" for o in others])] if others else []
    )
    notes += told(names, [key for key in outside if key not in UNNAMED])
    return Entry(tensors, averaged, tuple(notes))


def refuse_lora(state: Mapping[str, Tensor], known: set[str]) -> None:
    """The network may have such layers itself."""
    key = next((key for key in state if LORA.search(key)), None)
    if key is not None and not any(map(LORA.search, known)):
        raise WeightsError(
            f"{key} belongs to a LoRA, a change to a network's weights, expected the weights themselves; merge it into "
            "them and save those"
        )


def bare(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def group(state: Mapping[str, Tensor], known: set[str]) -> dict[str, dict[str, str]]:
    """{prefix: {the network's name: the checkpoint's}}, without wrappers where the names stay distinct."""
    distinct = all(max(Counter(map(bare, names)).values(), default=1) == 1 for names in (state, known))
    strip = bare if distinct else str
    names = {strip(name): name for name in known}
    groups: dict[str, dict[str, str]] = {}
    for key in state:
        parts = strip(key).split(".")
        for index in range(len(parts)):
            name = names.get(".".join(parts[index:]))
            if name is not None:
                groups.setdefault(".".join(parts[:index]), {})[name] = key
    return groups


def best_of(groups: Mapping[str, Mapping[str, str]], needed: int) -> list[str]:
    """The prefixes with most of the network's names, if most names are there; else none but the empty one."""
    most = max((len(names) for names in groups.values()), default=0)
    if most <= len(groups.get("", {})) or 2 * most < needed:
        return [""]
    return [prefix for prefix, names in groups.items() if len(names) == most]


def told(names: Mapping[str, str], outside: list[str]) -> list[str]:
    """One line for names that were changed, and for tensors that lie beside the network."""
    changed = [(name, key) for name, key in names.items() if name != key]
    if not changed:
        return []
    prefixes = {key.removesuffix(name) for name, key in changed}
    name, key = changed[0]
    beside = f"; left out: {', '.join(outside[:3])}{', …' if len(outside) > 3 else ''}" if outside else ""
    if len(prefixes) == 1 and key.endswith(name):
        return [f"the prefix {prefixes.pop()} was taken off the checkpoint's names{beside}"]
    return [f"a wrapper's part of the checkpoint's names is left aside: {key} is read as {name}{beside}"]
