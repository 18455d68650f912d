"""transformers 5 joins the experts of a layer in memory; on disk, and here, each has a name of its own."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

_WORDS = {False: ("gate_proj", "up_proj", "down_proj"), True: ("w1", "w3", "w2")}


def unjoined(state: Mapping[str, Tensor], mixtral: bool) -> dict[str, Tensor]:
    """A state_dict in the hub's spelling of experts. mixtral: with Mixtral's words for them."""
    found: dict[str, Tensor] = {}
    gate_word, up_word, down_word = _WORDS[mixtral]
    for name, tensor in state.items():
        before, experts, last = name.partition(".mlp.experts.")
        if mixtral:
            before = f"{before}.block_sparse_moe" if experts else name.replace(".mlp.gate.", ".block_sparse_moe.gate.")
        elif experts:
            before = f"{before}.mlp"
        if not experts:
            found[before if mixtral else name] = tensor
            continue
        for number, matrix in enumerate(tensor):
            start = f"{before}.experts.{number}"
            if last == "down_proj":
                found[f"{start}.{down_word}.weight"] = matrix
                continue
            gate, up = matrix.chunk(2)
            found[f"{start}.{gate_word}.weight"], found[f"{start}.{up_word}.weight"] = gate, up
    return found
