"""How groups become the rows that a model reads, and the batch that an objective does.

The K responses of a group share their prompt's tokens: a group is one sequence `[prompt | r1 | r2 | ... | rK]` in which
a response token attends to its prompt and to its own past, and in which positions go on from the prompt in every
response. The log-probabilities are those of K padded rows, for a fraction of the tokens. Under flex attention (on
CUDA) all groups are in one row with a `BlockMask`; else each has a row of its own with a boolean mask. Where prompts
short and responses long, attention costs more than shared tokens save, and groups are padded (`sharing_is_faster`).

    tokens     p p p a a b b b      (prompt of 3, responses of 2 and 3)
    segment    0 0 0 1 1 2 2 2
    position   0 1 2 3 4 3 4 5
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from buffer import Group, Response
from config import Config
from loss import Batch
from train.transfer import to_device

BLOCK = 128  # tokens: flex attention skips, or computes, so many queries by so many keys at a time (cuda.py)


@dataclass(slots=True)
class Packed:
    """Rows of tokens [R, T], and where in them the N tokens of all responses are predicted."""

    tokens: Tensor  # [R, T]
    positions: Tensor | None  # [R, T]; None: from 0 on in every row
    mask: object  # what the model takes as attention_mask: a BlockMask, or bool [R, 1, T, T]; None: causal
    source: Tensor  # [N] flat index into R*T of the token that predicts a response token
    target: Tensor  # [N] the response token
    response_index: Tensor  # [N] which of the U distinct responses it belongs to
    position: Tensor  # [N] its position in that response
    responses: list[Response]  # the U distinct responses
    num_tokens: int  # without the padding

    def to_BKT(self, values_N: Tensor, index_BK: Tensor) -> Tensor:
        """Values of the response tokens [B, K, T], 0 in the padding, where groups have these of the U responses."""
        longest = max(len(response.tokens) for response in self.responses)
        values_UT = values_N.new_zeros(len(self.responses), longest)
        return values_UT.index_put((self.response_index, self.position), values_N)[index_BK]


def pack(groups: list[Group], device: torch.device, flex: bool = False, share: bool = True) -> Packed:
    """Pack groups, each of any number of responses; a response that a group has several times is computed once.

    Args:
        groups: of one update or less.
        device: of the rows.
        flex: for flex attention, in one row under a block mask; else in a row each under a boolean mask.
        share: a group's responses share its prompt; else each has a row of its own, with the prompt, and no mask.
    """
    units: list[tuple[np.ndarray, list[Response]]] = []  # sequences: a prompt, and responses to it
    for group in groups:
        distinct = list({id(response): response for response in group.responses}.values())
        units += [(group.prompt, distinct)] if share else [(group.prompt, [response]) for response in distinct]
    responses = [response for _, some in units for response in some]
    parts = [part for prompt, some in units for part in (prompt, *(response.tokens for response in some))]
    counts = np.array([1 + len(some) for _, some in units])
    unit = np.repeat(np.arange(len(units)), counts)  # of each part
    is_prompt = np.zeros(len(parts), dtype=bool)
    is_prompt[counts.cumsum() - counts] = True
    index = (~is_prompt).cumsum() - 1  # of the response
    lengths = np.array([len(part) for part in parts])
    part_start = lengths.cumsum() - lengths  # where each part starts, all parts one after another
    prompt_length, unit_start = lengths[is_prompt], part_start[is_prompt]
    num_tokens = int(lengths.sum())

    # A value for each token, in that order.
    part = np.repeat(np.arange(len(parts)), lengths)
    in_part = np.arange(num_tokens) - part_start[part]
    position = in_part + np.where(is_prompt, 0, prompt_length[unit])[part]
    generated = ~is_prompt[part]
    # The token before predicts each; the prompt's last predicts the first of each response.
    source = np.where(in_part > 0, np.arange(num_tokens) - 1, (unit_start + prompt_length)[unit][part] - 1)[generated]

    if flex and share:  # all in one row, of whole blocks of flex attention
        shape, at = (1, -(-num_tokens // BLOCK) * BLOCK), np.arange(num_tokens)
    else:
        whole = np.diff(unit_start, append=num_tokens)
        longest = int(whole.max())
        shape = len(units), longest
        at = np.arange(num_tokens) + (np.arange(len(units)) * longest - unit_start)[unit][part]

    def rows(values: np.ndarray, padding: int) -> np.ndarray:
        padded = np.full(shape[0] * shape[1], padding)
        padded[at] = values
        return padded.reshape(shape)

    token = np.concatenate(parts).astype(np.int64)
    tokens = to_device(rows(token, 0), device)
    source, target, response_index, in_response = (
        to_device(each, device) for each in (at[source], token[generated], index[part][generated], in_part[generated])
    )
    if not share:
        return Packed(tokens, None, None, source, target, response_index, in_response, responses, num_tokens)
    positions, segments, group_id = (
        to_device(each, device) for each in (rows(position, 0), rows(part * generated, 0), rows(unit[part], -1))
    )
    visible, (R, T) = mask_mod(segments, group_id), shape
    if flex:
        from train.cuda import block_mask

        prompt_of = np.flatnonzero(is_prompt)[unit]
        mask = block_mask(visible, rows(part, len(parts))[0], rows(prompt_of[part], len(parts))[0], BLOCK, device)
    else:  # by broadcasting, which takes a fraction of flex attention's create_mask
        row, column = torch.arange(R, device=device)[:, None, None], torch.arange(T, device=device)
        mask = visible(row, None, column[:, None], column)[:, None]
    return Packed(tokens, positions, mask, source, target, response_index, in_response, responses, num_tokens)


def loss_batch(groups: list[Group], packed: Packed, logprobs_N: Tensor, config: Config, names: set[str]) -> Batch:
    """The objective's input: each group with its K responses, those that it has several times included. `names` are
    those of `Response.per_token` in the whole update."""
    unique, device = packed.responses, logprobs_N.device
    index = {id(response): u for u, response in enumerate(unique)}
    index_BK = to_device(np.array([[index[id(r)] for r in group.responses] for group in groups]), device)

    def to_BKT(values: list[np.ndarray]) -> Tensor:
        return packed.to_BKT(to_device(np.concatenate(values), device), index_BK)

    own_BKT = packed.to_BKT(logprobs_N, index_BK)
    ref_BKT = behaviour_BKT = own_BKT.detach()
    if config.has_reference:
        ref_BKT = to_BKT([response.ref_logprobs for response in unique])
    if config.reads_behaviour:
        behaviour_BKT = to_BKT([response.logprobs for response in unique])
    zeros = [np.zeros(len(response.tokens), np.float32) for response in unique]
    extra = {
        name: to_BKT([(r.per_token or {}).get(name, zero) for r, zero in zip(unique, zeros, strict=True)])
        for name in names
    }
    mask_BKT = packed.to_BKT(torch.ones_like(logprobs_N), index_BK)
    rewards_U = to_device(np.array([response.reward for response in unique]), device, torch.float32)
    return Batch(own_BKT, ref_BKT, behaviour_BKT, mask_BKT, rewards_U[index_BK], extra)


def packed_length(group: Group, share: bool) -> int:
    """Tokens of a packed group: its prompt once and each distinct response, or a padded row for each."""
    lengths = [len(response.tokens) for response in {id(r): r for r in group.responses}.values()]
    return len(group.prompt) + sum(lengths) if share else len(lengths) * (len(group.prompt) + max(lengths))


def micro_batches(groups: list[Group], max_tokens: int, share: bool) -> Iterator[list[Group]]:
    """Whole groups, alike in length, together at most `max_tokens` with the padding (a single one may have more)."""
    remaining = sorted(groups, key=lambda group: packed_length(group, share), reverse=True)
    while remaining:
        fit = max(1, max_tokens // packed_length(remaining[0], share))
        yield remaining[:fit]
        remaining = remaining[fit:]


def sharing_is_faster(groups: list[Group], flex: bool, parameters: int, width: int) -> bool:
    """Whether groups that share their prompts are computed faster than padded rows, by a model with so many parameters
    and a width of its hidden size times its layers; `flex`: under flex attention."""
    tokens = {share: np.array([packed_length(group, share) for group in groups]) for share in (True, False)}
    if flex:  # which skips masked blocks: on an H100 a token took 1.3 to 1.5 times as long, whatever the shape
        return bool(1.4 * tokens[True].sum() < tokens[False].sum())
    # Under a dense mask a token attends to its whole row. On a CPU core a step of attention took as long as 1.5 of the
    # linear layers', which have N for a token, where attention has 2 x width x row; a causal row has half of that.
    rows = tokens[False] / [len({id(response) for response in group.responses}) for group in groups]
    shared = tokens[True] * (parameters + 3 * width * tokens[True])
    return bool(shared.sum() < (tokens[False] * (parameters + 1.5 * width * rows)).sum())


def mask_mod(segments: Tensor, group_id: Tensor) -> Callable:
    """Flex attention's function of the mask: a token attends to its own group's prompt and its own segment's past."""

    def visible(b, h, q, k):
        same_segment_or_prompt = (segments[b, k] == 0) | (segments[b, q] == segments[b, k])
        return (group_id[b, q] == group_id[b, k]) & same_segment_or_prompt & (q >= k)

    return visible
