"""Encodes meshes as PLY (Turk 1994; http://paulbourke.net/dataformats/ply/) with their provenance inside."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from calotype_shared.errors import GenerationFailed
from calotype_worker.request import Mesh

_TAG = "calotype "  # begins the comment lines that hold the JSON, in order
_PIECE = 200  # characters of JSON per line: some readers refuse lines longer than their buffer
_VERTEX = np.dtype([("position", "<f4", 3), ("color", "u1", 3)])
_FACE = np.dtype([("corners", "u1"), ("vertices", "<i4", 3)])


def encode_ply(mesh: Mesh | None, provenance: Mapping[str, Any]) -> bytes:
    """A binary little-endian PLY of triangles with a color at each vertex.

    Raises:
        GenerationFailed: there is no mesh, because the generated object has no surface.
    """
    if mesh is None or not len(mesh.faces):
        raise GenerationFailed(
            "the generated object has no surface, so no mesh can be written; use another prompt or seed, more steps, "
            "or output_format gif to see what was generated"
        )
    text = json.dumps(provenance, sort_keys=True)
    comments = [f"comment {_TAG}{text[start : start + _PIECE]}" for start in range(0, len(text), _PIECE)]
    header = [
        "ply",
        "format binary_little_endian 1.0",
        *comments,
        f"element vertex {len(mesh.vertices)}",
        *(f"property float {axis}" for axis in "xyz"),
        *(f"property uchar {color}" for color in ("red", "green", "blue")),
        f"element face {len(mesh.faces)}",
        "property list uchar int vertex_indices",
        "end_header",
    ]
    vertices = np.empty(len(mesh.vertices), _VERTEX)
    vertices["position"], vertices["color"] = mesh.vertices, mesh.colors
    faces = np.empty(len(mesh.faces), _FACE)
    faces["corners"], faces["vertices"] = 3, mesh.faces
    return "\n".join([*header, ""]).encode("ascii") + vertices.tobytes() + faces.tobytes()


def read_provenance(data: bytes) -> dict[str, Any]:
    """The metadata that `encode_ply` wrote. Empty for other meshes."""
    header, _, _ = data.partition(b"\nend_header\n")
    start = f"comment {_TAG}"
    lines = header.decode("ascii", "replace").split("\n")
    text = "".join(line.removeprefix(start) for line in lines if line.startswith(start))
    found: dict[str, Any] = json.loads(text) if text else {}
    return found
