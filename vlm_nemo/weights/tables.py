"""The names of one model: which tables its parts have, every tensor of it, and what a folder holds besides."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace

from vlm_nemo.model.config import ModelConfig, VisionConfig
from vlm_nemo.model.vision import layers_used
from vlm_nemo.model.vlm import PARTS
from vlm_nemo.types import UserError
from vlm_nemo.weights.alone import ALONE
from vlm_nemo.weights.configs.languages import fitting_language
from vlm_nemo.weights.configs.towers import fitting_tower
from vlm_nemo.weights.families import FAMILIES
from vlm_nemo.weights.names.languages import HEAD_NAME, decoder_names
from vlm_nemo.weights.names.projectors import PROJECTORS
from vlm_nemo.weights.names.rows import LAYER, Entry, Table
from vlm_nemo.weights.names.towers import TOWERS
from vlm_nemo.weights.spelling import Name, Prefixes, spelled, understood
from vlm_nemo.weights.transforms import Sizes

SHOWN = 8
"""Keys that an error lists before it counts the rest."""


@dataclass(frozen=True, kw_only=True)
class Naming:
    """How the tensors of a folder are named: in its parts, and in its files."""

    tables: dict[str, Table]
    prefixes: Prefixes

    def entries(self, cfg: ModelConfig, parts: Collection[str] = PARTS) -> Iterator[Entry]:
        """Every global tensor of a model, part by part."""
        for part in (part for part in PARTS if part in parts and part in self.tables):
            section, layers, sizes = _section(cfg, part)
            yield from self.tables[part].entries(part, section, layers, sizes)

    def spelled(self, part: str, name: str) -> str:
        """As a file has it, in the hub's spelling."""
        return spelled(self.prefixes, part, name)

    def understood(self, key: str) -> Name | None:
        """The inverse, for every spelling."""
        return understood(self.prefixes, key)

    def idle_layers(self, cfg: ModelConfig) -> set[Name]:
        """The tensors of vision layers behind the one whose output the projector takes."""
        v = cfg.vision
        if "vision" not in self.tables:
            return set()
        rows = [row for row in self.tables["vision"].rows if LAYER in row.ours and row.when(v)]
        names = [name for row in rows for name in row.theirs]
        return {("vision", name.replace(LAYER, str(n))) for n in range(layers_used(v), v.num_layers) for name in names}

    def leftovers(self, names: Iterable[Name], cfg: ModelConfig) -> tuple[list[Name], list[Name]]:
        """(what no forward pass of ours reads and may be kept aside, what nobody knows) among `names`."""
        used = {(entry.part, name) for entry in self.entries(cfg) for name in entry.theirs}
        idle = self.idle_layers(cfg)
        if cfg.language.tied_embeddings:
            idle.add(("language", HEAD_NAME))
        rest = [name for name in names if name not in used]
        known = [n for n in rest if n in idle or (n[0] in self.tables and self.tables[n[0]].is_idle(n[1]))]
        strange = set(rest) - set(known)
        return known, [name for name in rest if name in strange]


def naming_of(cfg: ModelConfig) -> Naming:
    """The names of a whole model of ours, by its family. Raises UserError for a composition that has none."""
    if cfg.family not in FAMILIES:
        raise UserError(
            f"model.family={cfg.family!r} is no family of Hugging Face's ({', '.join(FAMILIES)}); part=vision and "
            "part=language write its parts"
        )
    family = FAMILIES[cfg.family]
    tables = {
        "vision": TOWERS[fitting_tower(cfg.vision, family.towers)[0]],
        "projector": PROJECTORS[family.projector],
        "language": decoder_names(fitting_language(cfg.language, family.languages)[0]),
    }
    return Naming(tables=tables, prefixes=family.prefixes)


def naming_of_part(cfg: ModelConfig, part: str) -> tuple[str, Naming]:
    """(the class's name, the names) of a part alone, whatever the whole is."""
    kinds = [alone.kind for alone in ALONE.values() if alone.part == part]
    if part == "vision":
        kind = fitting_tower(cfg.vision, list(dict.fromkeys(kinds)))[0]
    else:
        kind = fitting_language(cfg.language, list(dict.fromkeys(kinds)))[0]
    architecture = next(name for name, alone in ALONE.items() if (alone.part, alone.kind) == (part, kind))
    return architecture, naming_of_class(architecture)


def naming_of_class(architecture: str) -> Naming:
    """The names of a class that is one part of ours."""
    alone = ALONE[architecture]
    return Naming(
        tables={alone.part: TOWERS[alone.kind] if alone.part == "vision" else decoder_names(alone.kind)},
        prefixes=alone.prefixes,
    )


def exported_vision(naming: Naming, cfg: ModelConfig, kept: Collection[Name]) -> VisionConfig:
    """The tower as it is written: with all its layers where the idle ones were kept, else with those that are used.

    kept: a checkpoint's unused tensors. The features are the same either way.
    """
    if naming.idle_layers(cfg) <= set(kept):
        return cfg.vision
    return replace(cfg.vision, num_layers=layers_used(cfg.vision), feature_layer=-1)


def _section(cfg: ModelConfig, part: str) -> tuple[object, int, Sizes]:
    """(configuration, layers, sizes) of a part."""
    v, p, lang = cfg.vision, cfg.projector, cfg.language
    if part == "vision":
        sizes = Sizes(heads=v.num_heads, kv_heads=v.num_heads, patch=v.patch_size, frames=v.temporal_patch_size)
        return v, max(layers_used(v), v.global_layers), sizes
    if part == "language":
        sizes = Sizes(heads=lang.num_heads, kv_heads=lang.num_kv_heads, experts=lang.moe.experts or 0)
        return lang, lang.num_layers, sizes
    return p, p.num_layers, Sizes(heads=p.num_heads, kv_heads=p.num_heads)


def check_unused(keys: Iterable[str], cfg: ModelConfig) -> None:
    """Raises UserError that lists the tensors, by their names in a file, that no model of this configuration has."""
    naming = naming_of(cfg)
    names = {key: naming.understood(key) for key in keys}
    strange = set(naming.leftovers([name for name in names.values() if name is not None], cfg)[1])
    if unknown := [key for key, name in names.items() if name is None or name in strange]:
        raise UserError(f"a {FAMILIES[cfg.family].architecture} of this configuration has no tensor {listed(unknown)}")


def listed(keys: Iterable[str]) -> str:
    """a, b, c and 12 more"""
    names = sorted(keys)
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
