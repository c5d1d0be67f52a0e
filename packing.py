"""How groups become the rows that a model reads.

The K responses of a group share their prompt's tokens: a group is one sequence `[prompt | r1 | r2 | ... | rK]` in which
a response token attends to its prompt and to its own past, and in which positions go on from the prompt in every
response. Same log-probabilities as K padded rows, for a fraction of the tokens. Under flex attention (on CUDA) all
groups stand in one row with a `BlockMask`; else each has a row of its own with a boolean mask. Where prompts are short
and responses long, what attention costs more outweighs the tokens saved, and they are padded rows (`sharing_pays`).

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
from transfer import to_device


@dataclass(slots=True)
class Packed:
    """Rows of tokens [R, T], and where in them the N tokens of all responses are predicted."""

    tokens: Tensor  # [R, T]
    positions: Tensor | None  # [R, T]; None: from 0 on in every row
    mask: object  # what the model takes as attention_mask: a BlockMask, or bool [R, 1, T, T]; None: causal
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


def pack(groups: list[Group], device: torch.device, flex: bool = False, share: bool = True) -> Packed:
    """Pack groups, each of any number of responses; one that a group holds several times is computed once.

    Args:
        groups: what to pack.
        device: where the rows are to be.
        flex: for flex attention, in one row under a block mask; else in a row each under a boolean mask.
        share: a group's responses share its prompt; else each has a row of its own, with the prompt, and no mask.
    """
    units: list[tuple[np.ndarray, list[Trajectory]]] = []  # what stands together: a prompt, and the responses to it
    for group in groups:
        distinct = list({id(response): response for response in group.responses}.values())
        units += [(group.prompt, distinct)] if share else [(group.prompt, [response]) for response in distinct]
    responses = [response for _, some in units for response in some]
    parts = [part for prompt, some in units for part in (prompt, *(response.tokens for response in some))]
    counts = np.array([1 + len(some) for _, some in units])
    unit = np.repeat(np.arange(len(units)), counts)  # of each part
    is_prompt = np.zeros(len(parts), dtype=bool)
    is_prompt[counts.cumsum() - counts] = True
    owner = (~is_prompt).cumsum() - 1
    lengths = np.array([len(part) for part in parts])
    part_start = lengths.cumsum() - lengths  # where each part starts, all parts one after another
    prompt_length, unit_start = lengths[is_prompt], part_start[is_prompt]
    read = int(lengths.sum())

    # A value for each token, in that order.
    part = np.repeat(np.arange(len(parts)), lengths)
    in_part = np.arange(read) - part_start[part]
    position = in_part + np.where(is_prompt, 0, prompt_length[unit])[part]
    written = ~is_prompt[part]  # by the policy
    # The token before predicts each; the prompt's last predicts the first of each response.
    source = np.where(in_part > 0, np.arange(read) - 1, (unit_start + prompt_length)[unit][part] - 1)[written]

    if flex and share:  # all in one row, of whole blocks of flex attention
        shape, at = (1, -(-read // 128) * 128), np.arange(read)
    else:
        whole = np.diff(unit_start, append=read)
        longest = int(whole.max())
        shape, at = (len(units), longest), np.arange(read) + (np.arange(len(units)) * longest - unit_start)[unit][part]

    def rows(values: np.ndarray, padding: int) -> np.ndarray:
        padded = np.full(shape[0] * shape[1], padding)
        padded[at] = values
        return padded.reshape(shape)

    token = np.concatenate(parts).astype(np.int64)
    tokens = to_device(rows(token, 0), device)
    source, target, owner, place = (
        to_device(each, device) for each in (at[source], token[written], owner[part][written], in_part[written])
    )
    if not share:
        return Packed(tokens, None, None, source, target, owner, place, responses, read)
    positions, segments, group_id = (
        to_device(each, device) for each in (rows(position, 0), rows(part * written, 0), rows(unit[part], -1))
    )
    rule, (R, T) = allowed(segments, group_id), shape
    if flex:
        mask = create_block_mask(rule, R, None, T, T, device)
    else:  # by broadcasting, which takes a fraction of flex attention's create_mask
        row, column = torch.arange(R, device=device)[:, None, None], torch.arange(T, device=device)
        mask = rule(row, None, column[:, None], column)[:, None]
    return Packed(tokens, positions, mask, source, target, owner, place, responses, read)


def tokens_of(group: Group, share: bool) -> int:
    """How many `pack` lays out for a group: its prompt once and each distinct response, or a padded row for each."""
    lengths = [len(response.tokens) for response in {id(r): r for r in group.responses}.values()]
    return len(group.prompt) + sum(lengths) if share else len(lengths) * (len(group.prompt) + max(lengths))


def sharing_pays(groups: list[Group], flex: bool, parameters: int, width: int) -> bool:
    """Whether groups are computed sooner as they share their prompts than as padded rows.

    Args:
        groups: of an update.
        flex: whether under flex attention.
        parameters: of the model, how many.
        width: its hidden size times its layers.
    """
    tokens = {share: np.array([tokens_of(group, share) for group in groups]) for share in (True, False)}
    if flex:  # which skips what nobody may see: on an H100 a token took 1.3 to 1.5 times as long, whatever the shape
        return bool(1.4 * tokens[True].sum() < tokens[False].sum())
    # Under a dense mask a token attends to its whole row. On a CPU core a step of attention took as long as 1.5 of the
    # linear layers', whose are N for a token, where attention's are 2 x width x row; a causal row has half of that.
    rows = tokens[False] / [len({id(response) for response in group.responses}) for group in groups]
    shared = tokens[True] * (parameters + 3 * width * tokens[True])
    return bool(shared.sum() < (tokens[False] * (parameters + 1.5 * width * rows)).sum())


def allowed(segments: Tensor, group_id: Tensor) -> Callable:
    """The rule of the mask: a token attends to its own group's prompt and to its own segment's past."""

    def rule(b, h, q, k):
        visible = (segments[b, k] == 0) | (segments[b, q] == segments[b, k])
        return (group_id[b, q] == group_id[b, k]) & visible & (q >= k)

    return rule
