"""The geometry of .gltf and .glb files (glTF 2.0), strictly: read right, or refused with what is not supported.

General readers skip what they don't know, and the result looks like a mesh: quantised positions thousands of times
too large, zeros in place of a compressed part, skinned parts at the wrong scale. This one reads positions and
faces alone: node transforms, instances, triangles, strips and fans, integer positions (KHR_mesh_quantization),
sparse accessors, and skins and morph targets at the file's own pose. Points and lines are no surface and are
left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from elastic3d.geometry.gltf_data import GltfFile, as_list, as_object, as_vector, shown
from elastic3d.geometry.mesh_parsing import MOST, FormatError
from elastic3d.geometry.polygons import fan, strip

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_IDENTITY = np.eye(4)

MOST_DRAWN = 100_000  # primitives, an instance each time; more take minutes and are no single object


def read_gltf(path: Path, data: bytes) -> tuple[Floats, Ints]:
    """Positions (V, 3) in the scene's frame and faces (F, 3) of a file's content; `path` is where its buffers are.

    Raises FormatError if it is cut off or broken, or needs what is not supported.
    """
    file = GltfFile(data, path.parent)
    file.check_version_and_extensions()
    return _Scene(file).surface()


class _Scene:
    """The scene of a file, its nodes and their meshes."""

    def __init__(self, file: GltfFile) -> None:
        self._file = file
        self._size = 0

    def surface(self) -> tuple[Floats, Ints]:
        """All meshes of the scene in its frame."""
        world, nodes = self._place_nodes()
        vertices, faces, start = [np.zeros((0, 3))], [np.zeros((0, 3), np.int64)], 0
        for number in nodes:
            node = self._file.item("nodes", number)
            if "mesh" not in node:
                continue
            for points, triangles in self._parts(node, world[number], world):
                vertices.append(points)
                faces.append(triangles + start)
                start += len(points)
        return np.concatenate(vertices), np.concatenate(faces)

    # -------------------------------------------------------------------------------------------------- nodes

    def _place_nodes(self) -> tuple[dict[int, Floats], list[int]]:
        """The transform (4, 4) of each node to the scene's frame, and the nodes of the scene in order."""
        count = len(self._file.array("nodes"))
        children = [
            self._file.indices(self._file.item("nodes", n), "children", "nodes") for n in range(count)
        ]
        parent: dict[int, int] = {}
        for node, below in enumerate(children):
            for child in below:
                if child in parent:
                    raise FormatError(f"node {child} has two parents, or one twice")
                parent[child] = node
        if self._file.array("scenes"):
            scene = self._file.item("scenes", self._file.tree.get("scene", 0))
            roots = self._file.indices(scene, "nodes", "nodes")
        else:
            roots = [node for node in range(count) if node not in parent]
        nodes = list(dict.fromkeys(self._below(roots, children)))
        self._check_drawn(nodes)
        every, world = (
            self._below([n for n in range(count) if n not in parent], children),
            dict[int, Floats](),
        )
        if len(every) < count:
            raise FormatError("its nodes form a circle")
        for node in every:
            local = self._local(node)
            above = world[parent[node]] if node in parent else None
            world[node] = local if above is None else above if local is _IDENTITY else above @ local
        return world, nodes

    def _check_drawn(self, nodes: list[int]) -> None:
        """FormatError for more primitives than `MOST_DRAWN`, before any of them or a transform is read."""
        sizes = [
            len(as_list(self._file.item("meshes", mesh).get("primitives"), "primitives"))
            for mesh in range(len(self._file.array("meshes")))
        ]
        drawn = 0
        for node in nodes:
            mesh = self._file.item("nodes", node).get("mesh")
            if isinstance(mesh, int) and 0 <= mesh < len(sizes):  # else it is told when it is read
                drawn += sizes[mesh]
                if drawn > MOST_DRAWN:
                    raise FormatError(f"its scene draws more than {MOST_DRAWN:,} primitives")

    def _below(self, roots: list[int], children: list[list[int]]) -> list[int]:
        """The roots and all nodes below them, parents first."""
        order, stack = list[int](), roots[::-1]
        while stack:
            order.append(stack.pop())
            stack += children[order[-1]][::-1]
            if len(order) > len(children) + len(roots):
                raise FormatError("its nodes form a circle")
        return order

    def _local(self, number: int) -> Floats:
        """The transform (4, 4) of a node to its parent's frame."""
        node = self._file.item("nodes", number)
        if "matrix" in node:
            return as_vector(node["matrix"], 16, f"the matrix of node {number}").reshape(4, 4).T
        if not {"translation", "rotation", "scale"} & node.keys():
            return _IDENTITY
        result = np.eye(4)
        if "rotation" in node:
            x, y, z, w = quaternion = as_vector(node["rotation"], 4, f"the rotation of node {number}")
            square = float(quaternion @ quaternion)
            if not square > 0:
                raise FormatError(f"the rotation of node {number} is zero, expected a unit quaternion")
            cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
            result[:3, :3] += 2 / square * (w * cross + cross @ cross)
        if "scale" in node:
            result[:3, :3] *= as_vector(node["scale"], 3, f"the scale of node {number}")
        if "translation" in node:
            result[:3, 3] = as_vector(node["translation"], 3, f"the translation of node {number}")
        return result

    # -------------------------------------------------------------------------------------------------- meshes

    def _parts(
        self, node: dict[str, Any], place: Floats, world: dict[int, Floats]
    ) -> Iterator[tuple[Floats, Ints]]:
        """Positions (V, 3) and faces (F, 3) of the primitives of a node's mesh, placed."""
        if "EXT_mesh_gpu_instancing" in as_object(node.get("extensions", {}), "extensions"):
            raise FormatError("it uses the extension EXT_mesh_gpu_instancing, which is not supported")
        mesh = self._file.item("meshes", node["mesh"])
        weights = node.get("weights", mesh.get("weights", []))
        for primitive in as_list(mesh.get("primitives"), "primitives"):
            attributes = as_object(as_object(primitive, "a primitive").get("attributes"), "attributes")
            mode = primitive.get("mode", 4)
            if mode not in (4, 5, 6):  # points and lines
                if not isinstance(mode, int) or not 0 <= mode <= 3:
                    raise FormatError(f"the mode of a primitive is {shown(mode)}, expected 0 to 6")
                continue
            if "POSITION" not in attributes:
                continue
            points = self._positions(primitive, attributes["POSITION"], weights)
            faces = self._faces(primitive, mode, len(points))
            if "skin" in node:
                turn = self._blend(self._file.item("skins", node["skin"]), attributes, len(points), world)
                points = np.einsum("vij,vj->vi", turn[:, :3, :3], points) + turn[:, :3, 3]
                mirrored = np.linalg.det(turn[faces[:, 0], :3, :3]) < 0 if len(faces) else np.zeros(0, bool)
            else:
                points = points @ place[:3, :3].T + place[:3, 3]
                mirrored = np.full(len(faces), np.linalg.det(place[:3, :3]) < 0)
            faces[mirrored] = faces[mirrored, ::-1]
            self._size += len(points) + len(faces)
            if self._size > MOST:
                raise FormatError(f"its scene has more than {MOST:,} vertices and faces")
            yield points, faces

    def _positions(self, primitive: dict[str, Any], accessor: Any, weights: Any) -> Floats:
        """Positions (V, 3) of a primitive with its morph targets at their weights."""
        points = self._file.accessor(accessor, "VEC3", "positions", primitive)
        targets = as_list(primitive.get("targets", []), "targets")
        shares = (
            as_vector(weights, len(targets), "the weights of a mesh") if weights else np.zeros(len(targets))
        )
        for share, target in zip(shares, targets, strict=True):
            if share and "POSITION" in as_object(target, "a target"):
                moved = self._file.accessor(target["POSITION"], "VEC3", "morph targets", primitive)
                if len(moved) != len(points):
                    raise FormatError(f"a morph target moves {len(moved):,} of {len(points):,} vertices")
                points = points + share * moved
        return points

    def _faces(self, primitive: dict[str, Any], mode: int, count: int) -> Ints:
        corners = np.arange(count)
        if "indices" in primitive:
            corners = self._file.accessor(primitive["indices"], "SCALAR", "indices", primitive)[:, 0]
            if corners.dtype.kind != "u":
                raise FormatError("the indices of a primitive are no unsigned integers")
            corners = corners.astype(np.int64)
        if len(corners) and corners.max() >= count:
            raise FormatError(
                f"a face refers to vertex {corners.max()} of {count}, a vertex that does not exist"
            )
        if mode != 4:
            return strip(corners) if mode == 5 else fan(corners)
        if len(corners) % 3:
            raise FormatError(f"a primitive has {len(corners):,} corners, expected three a triangle")
        return corners.reshape(-1, 3).copy()

    def _blend(self, skin: dict[str, Any], attributes: Any, count: int, world: dict[int, Floats]) -> Floats:
        """The transform (V, 4, 4) of each vertex of a skinned mesh; the node's own has no effect on it."""
        joints = self._file.indices(skin, "joints", "nodes")
        matrices = np.stack([world[joint] for joint in joints]) if joints else np.zeros((0, 4, 4))
        if "inverseBindMatrices" in skin:
            inverse = self._file.accessor(skin["inverseBindMatrices"], "MAT4", "inverse bind matrices", skin)
            if len(inverse) < len(joints):
                raise FormatError(f"a skin has {len(joints)} joints and {len(inverse)} inverse bind matrices")
            matrices = matrices @ inverse[: len(joints)].reshape(-1, 4, 4).transpose(0, 2, 1)
        total, blend, number = np.zeros(count), np.zeros((count, 4, 4)), 0
        while f"JOINTS_{number}" in attributes and f"WEIGHTS_{number}" in attributes:
            index = self._file.accessor(attributes[f"JOINTS_{number}"], "VEC4", "joints", skin).astype(
                np.int64
            )
            weight = self._file.accessor(attributes[f"WEIGHTS_{number}"], "VEC4", "weights", skin).astype(
                np.float64
            )
            if len(index) != count or len(weight) != count or (index[weight > 0] >= len(joints)).any():
                raise FormatError(
                    "the joints or weights of a skinned mesh do not fit its vertices and joints"
                )
            for slot in range(4):
                used = np.where(weight[:, slot] > 0, index[:, slot], 0)
                blend += weight[:, slot, None, None] * matrices[used] if len(joints) else 0
            total += weight.sum(axis=1)
            number += 1
        if not (total > 0).all():
            raise FormatError("a vertex of a skinned mesh has no weight")
        return blend / total[:, None, None]
