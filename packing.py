"""How groups become the rows that a model reads.

The K responses of a group share their prompt's tokens: a group is one sequence `[prompt | r1 | r2 | ... | rK]` in which
a response token attends to its prompt and to its own past, and in which positions go on from the prompt in every
response. Same log-probabilities as K padded rows, for a fraction of the tokens. Under flex attention (on CUDA) all
groups stand in one row with a `BlockMask`; else each has a row of its own with a boolean mask.

    tokens     p p p a a b b b      (prompt of 3, responses of 2 and 3)
    segment    0 0 0 1 1 2 2 2
    position   0 1 2 3 4 3 4 5
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

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
    place: Tensor  # [N] its place in that response
    responses: list[Trajectory]  # the U distinct responses
    read: int  # tokens without the padding

    def padded(self, values_N: Tensor) -> Tensor:
        """A value a token as rows of responses [U, T], 0 in the padding."""
        longest = max(len(response.tokens) for response in self.responses)
        return values_N.new_zeros(len(self.responses), longest).index_put((self.owner, self.place), values_N)


def pack(groups: list[Group], device: torch.device, flex: bool = False) -> Packed:
    """Pack groups, each of any number of responses; one that a group holds several times is computed once.

    Args:
        groups: what to pack.
        device: where the rows are to be.
        flex: for flex attention, in one row under a block mask; else in a row each under a boolean mask.
    """
    rows, sources, targets, owners, places, counts = [], [], [], [], [], []
    responses: list[Trajectory] = []
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
            places.append(np.arange(len(part)))
            start = end
        responses += unique
        counts.append(len(unique))
        rows.append(row)
    packed, group_id, starts = (one_row if flex else row_each)(rows)
    offset = np.repeat(np.repeat(starts, counts), [len(target) for target in targets])
    tokens, segments, positions, group_id, source, target, owner, place = (
        torch.from_numpy(array.astype(np.int64)).to(device, non_blocking=True)
        for array in (
            *packed,
            group_id,
            np.concatenate(sources) + offset,
            np.concatenate(targets),
            np.concatenate(owners),
            np.concatenate(places),
        )
    )
    rule, (R, T) = allowed(segments, group_id), tokens.shape
    if flex:
        mask = create_block_mask(rule, R, None, T, T, device)
    else:  # by broadcasting, which takes a fraction of flex attention's create_mask
        row, column = torch.arange(R, device=device)[:, None, None], torch.arange(T, device=device)
        mask = rule(row, None, column[:, None], column)[:, None]
    read = sum(row.shape[1] for row in rows)
    return Packed(tokens, positions, mask, source, target, owner, place, responses, read)


def row_each(rows: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A row for each group, padded to the longest.

    Returns:
        tokens, segments and positions [3, R, T]; the group of each place [R, T], -1 in the padding; where in the R*T
        places each group starts.
    """
    longest = max(row.shape[1] for row in rows)
    packed = np.zeros((3, len(rows), longest), dtype=np.int64)
    group_id = np.full((len(rows), longest), -1)
    for r, row in enumerate(rows):
        packed[:, r, : row.shape[1]] = row
        group_id[r, : row.shape[1]] = r
    return packed, group_id, np.arange(len(rows)) * longest


def one_row(rows: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All groups in one row, padded to a multiple of flex attention's block of 128. Returns as `row_each` does."""
    lengths = [row.shape[1] for row in rows]
    row = np.concatenate(rows, axis=1)
    padding = -row.shape[1] % 128
    packed = np.pad(row, ((0, 0), (0, padding)))[:, None]
    group_id = np.pad(np.repeat(np.arange(len(rows)), lengths), (0, padding), constant_values=-1)[None]
    return packed, group_id, np.cumsum([0, *lengths[:-1]])


def allowed(segments: Tensor, group_id: Tensor) -> Callable:
    """The rule of the mask: a token attends to its own group's prompt and to its own segment's past."""

    def rule(b, h, q, k):
        visible = (segments[b, k] == 0) | (segments[b, q] == segments[b, k])
        return (group_id[b, q] == group_id[b, k]) & visible & (q >= k)

    return rule
