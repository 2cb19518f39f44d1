"""State dicts written in each of the formats that the package reads."""

from __future__ import annotations

import json

import safetensors.torch
import torch


def save(state, path, shards=None):
    """Write a state dict in the way that a file's name tells."""
    state = {key: value.detach().clone() for key, value in state.items()}
    if path.name.endswith(".index.json"):
        names = sorted(state)
        places = {name: f"part-{i % shards}.safetensors" for i, name in enumerate(names)}
        for shard in set(places.values()):
            part = {name: state[name] for name in names if places[name] == shard}
            safetensors.torch.save_file(part, path.with_name(shard))
        path.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    elif path.suffix == ".safetensors":
        safetensors.torch.save_file(state, path, metadata={"format": "pt", "made by": "a test"})
    else:
        torch.save(state, path)
    return path
