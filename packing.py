"""How groups become the rows that a model reads.

The K responses of a group share their prompt's tokens: a group is one sequence `[prompt | r1 | r2 | ... | rK]` in which
a response token attends to its prompt and to its own past, and in which positions go on from the prompt in every
response. Same log-probabilities as K padded rows, for a fraction of the tokens. On CUDA all groups stand in one row
under a flex-attention `BlockMask`, on the CPU each has a row of its own under a boolean mask.

    tokens     p p p a a b b b      (prompt of 3, responses of 2 and 3)
    segment    0 0 0 1 1 2 2 2
    position   0 1 2 3 4 3 4 5
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from buffer import Group, Trajectory


@dataclass(slots=True)
class Packed:
    """Rows of tokens [R, T], and where in them the N tokens of all responses are predicted."""

    tokens: Tensor  # [R, T]
    positions: Tensor  # [R, T]
    mask: object  # what the model takes as attention_mask: a BlockMask, or bool [R, 1, T, T]
    source: Tensor  # [N] flat index into R*T: the token that predicts a response token
    target: Tensor  # [N] the response token
    owner: Tensor  # [N] which of the U distinct responses it belongs to
    responses: list[Trajectory]  # the U distinct responses
    read: int  # tokens without the padding


def pack(groups: list[Group], device: torch.device) -> Packed:
    """Pack groups, each of any number of responses; one that a group holds several times is computed once."""
    rows, sources, targets, owners, responses, counts = [], [], [], [], [], []
    for group in groups:
        unique = list({id(response): response for response in group.responses}.values())
        parts = [group.prompt, *(response.tokens for response in unique)]
        row = np.zeros((3, sum(map(len, parts))), dtype=np.int64)  # tokens, segments, positions
        prompt_end = start = len(group.prompt)
        row[0], row[2, :start] = np.concatenate(parts), np.arange(start)
        for segment, part in enumerate(parts[1:], 1):
            end = start + len(part)
            row[1, start:end], row[2, start:end] = segment, prompt_end + np.arange(len(part))
            source = np.arange(start - 1, end - 1)
            source[0] = prompt_end - 1  # the prompt's last token predicts the first of each response
            sources.append(source)
            targets.append(part)
            owners.append(np.full(len(part), len(responses) + segment - 1))
            start = end
        responses += unique
        counts.append(len(unique))
        rows.append(row)
    packed, groups_RT, starts = _one_row(rows) if device.type == "cuda" else _one_row_each(rows)
    offset = np.repeat(np.repeat(starts, counts), [len(target) for target in targets])
    arrays = np.concatenate(sources) + offset, np.concatenate(targets), np.concatenate(owners)
    tokens, segments, positions, group_id = (
        torch.from_numpy(array).to(device, non_blocking=True) for array in (*packed, groups_RT)
    )
    make_mask = _block_mask if device.type == "cuda" else _dense_mask
    indices = (torch.from_numpy(array.astype(np.int64)).to(device, non_blocking=True) for array in arrays)
    read = sum(row.shape[1] for row in rows)
    return Packed(tokens, positions, make_mask(segments, group_id), *indices, responses, read)


def _one_row_each(rows: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """[3, R, T] padded to the longest, the group of each place [R, T] (-1 in the padding), each group's flat start."""
    longest = max(row.shape[1] for row in rows)
    packed = np.zeros((3, len(rows), longest), dtype=np.int64)
    group_id = np.full((len(rows), longest), -1)
    for r, row in enumerate(rows):
        packed[:, r, : row.shape[1]] = row
        group_id[r, : row.shape[1]] = r
    return packed, group_id, np.arange(len(rows)) * longest


def _one_row(rows: list[np.ndarray], multiple: int = 128) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The same with all groups in one row, its length a multiple of the attention kernel's block."""
    lengths = [row.shape[1] for row in rows]
    row = np.concatenate(rows, axis=1)
    padding = -row.shape[1] % multiple
    packed = np.pad(row, ((0, 0), (0, padding)))[:, None]
    group_id = np.pad(np.repeat(np.arange(len(rows)), lengths), (0, padding), constant_values=-1)[None]
    return packed, group_id, np.cumsum([0, *lengths[:-1]])


def _dense_mask(segments: Tensor, group_id: Tensor) -> Tensor:
    """bool [R, 1, T, T], True where the token (row) may attend to the other (column)."""
    same = group_id[:, :, None] == group_id[:, None, :]
    visible = (segments[:, None, :] == 0) | (segments[:, :, None] == segments[:, None, :])
    causal = torch.ones(segments.shape[1], segments.shape[1], dtype=torch.bool, device=segments.device).tril()
    return (same & visible & causal)[:, None]


def _block_mask(segments: Tensor, group_id: Tensor):
    """The same rule for flex attention, which skips the blocks that hold no allowed pair."""
    from torch.nn.attention.flex_attention import create_block_mask

    def allowed(b, h, q, k):
        visible = (segments[b, k] == 0) | (segments[b, q] == segments[b, k])
        return (group_id[b, q] == group_id[b, k]) & visible & (q >= k)

    rows, length = segments.shape
    return create_block_mask(allowed, rows, None, length, length, device=segments.device)
