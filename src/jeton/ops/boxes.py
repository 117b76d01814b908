"""Boxes (x0, y0, x1, y1) in pixels, on (N, 4) tensors: overlap, hull, quadrants, merging of neighbours."""

from __future__ import annotations

import torch
from torch import Tensor


def area(boxes: Tensor) -> Tensor:
    """(...) of boxes (..., 4); nothing where a box is turned inside out."""
    return (boxes[..., 2:] - boxes[..., :2]).clamp_min(0).prod(-1)


def intersection(a: Tensor, b: Tensor) -> Tensor:
    """(N, M) the area that boxes (N, 4) and (M, 4) share."""
    low, high = torch.maximum(a[:, None, :2], b[None, :, :2]), torch.minimum(a[:, None, 2:], b[None, :, 2:])
    return (high - low).clamp_min(0).prod(-1)


def iou(a: Tensor, b: Tensor) -> Tensor:
    """(N, M) intersection over union; 0 where both boxes are empty."""
    shared = intersection(a, b)
    union = area(a)[:, None] + area(b)[None] - shared
    return torch.where(union > 0, shared / union.clamp_min(torch.finfo(torch.float32).tiny), 0)


def hull(boxes: Tensor) -> Tensor:
    """(4,) the smallest box that holds all of (N, 4), N >= 1."""
    return torch.cat([boxes[:, :2].amin(0), boxes[:, 2:].amax(0)])


def merge_neighbours(boxes: Tensor, threshold: float) -> Tensor:
    """(M, 4) boxes (N, 4) after those with an IoU above `threshold` have been replaced by their hull, until no two are."""
    boxes = boxes.clone()
    while len(boxes) > 1:
        overlap = iou(boxes, boxes).fill_diagonal_(0)
        first, second = divmod(int(overlap.argmax()), len(boxes))
        if overlap[first, second] <= threshold:
            break
        boxes[first] = hull(boxes[[first, second]])
        boxes = torch.cat([boxes[:second], boxes[second + 1 :]])
    return boxes


def quadrants(width: int, height: int) -> Tensor:
    """(4, 4) the 2 x 2 grid of a picture, row by row; an odd side gives its last pixel to the later half."""
    x, y = width // 2, height // 2
    corners = [(0, 0, x, y), (x, 0, width, y), (0, y, x, height), (x, y, width, height)]
    return torch.tensor(corners, dtype=torch.float32)


def clip(boxes: Tensor, width: int, height: int) -> Tensor:
    """(N, 4) boxes cut to the picture."""
    return torch.minimum(boxes.clamp_min(0), boxes.new_tensor([width, height, width, height]))


def around_patches(index: Tensor, width: int, patch: int, side: tuple[int, int], inclusive: bool = False) -> Tensor:
    """(B, 4) the box around patches `index` (B, K) of a grid `width` wide, in pixels of a picture of `side` (height, width).

    It ends where the last row and column of patches begin, but holds one patch at least; `inclusive` takes these in as well."""
    row, col = index // width, index % width
    low = torch.stack([col.amin(1), row.amin(1)], 1) * patch
    high = torch.stack([col.amax(1), row.amax(1)], 1) * patch + (patch if inclusive else 0)
    high = torch.maximum(high, low + patch).minimum(high.new_tensor([side[1], side[0]]))
    return torch.cat([low, high], 1)


def cut(pictures: Tensor, boxes: Tensor) -> Tensor:
    """Each picture (B, C, H, W) cut to its box (B, 4) and enlarged to its old size, bilinear with corners aligned: the first and
    last pixel of a line are those of the box. Differentiable in the picture."""
    height, width = pictures.shape[-2:]
    lines = []
    for at, length in ((0, width), (1, height)):
        low, high = boxes[:, at].float(), boxes[:, at + 2].float() - 1
        step = torch.linspace(0, 1, length, device=boxes.device)
        lines.append((low[:, None] + step * (high - low)[:, None]) * 2 / max(1, length - 1) - 1)
    x, y = lines[0][:, None].expand(-1, height, -1), lines[1][:, :, None].expand(-1, -1, width)
    grid = torch.stack([x, y], -1).to(pictures.dtype)
    return torch.nn.functional.grid_sample(pictures, grid, mode="bilinear", padding_mode="border", align_corners=True)
