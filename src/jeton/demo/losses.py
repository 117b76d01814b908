"""What the demo model is trained on. Every loss is kept on from its first stage to the last step of training.

patches   Each patch must tell the number and colour of its digit and in which half of the image it is, vertically and
          horizontally, or that it is background, at the output of the block that LLaVA reads.
words     The same after the projector, in the language model's own words: dot products of a projected patch with word
          embeddings are classified. This aligns the two halves of the model, as CLIP's image-text training does for
          the real LLaVA.
class     The class token must tell which (digit, colour) pairs, which digits and which colours are in the scene, both
          at the output of the block LLaVA reads and at the encoder's end.
look      The class token's attention in the block LLaVA reads, averaged over heads, must fall on every digit: mean
          over digits of -log(attention mass on that digit's patches). Without it a class token may collect its
          knowledge in earlier blocks, and its attention there says nothing about what is where.
point     In front of the first word of an answer about one digit (in the joint stage: of every word), the attention of
          one language-model layer, averaged over heads, must fall on that digit: -log(attention mass on its patches).
          Binding the word "red" to the patches that are red is a small part of the answers' loss and is found late
          without being shown.
answers   Next-token cross-entropy on the answers to several questions about a scene, and on descriptions of it,
          packed as turns of a conversation.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from jeton.demo.data import COLOURS, GRID, NUMBERS
from jeton.demo.model import WIDTH

_WORDS = (NUMBERS, tuple(COLOURS), ("top", "bottom"), ("left", "right"))
_POINT_LAYER = 2  # the question's words have been read in the two layers before
_PAIRS = len(NUMBERS) * len(COLOURS)


@dataclass
class Batch:
    """B scenes. P patches, D digits at most, T text positions.

    pixels (B, 3, SIZE, SIZE) in -1..1;
    number, colour (B, P): class of each patch, the last class is "neither", -100 is ignored;
    owner (B, P): digit a patch belongs to, negative if none; present (B, labels): multi-hot scene content;
    ids, attended, labels (B, T): the conversation, which positions are visible, and answers to learn (-100 elsewhere);
    asked (B, T): the digit in question, at positions in front of words of its answer, else -1.
    """

    pixels: Tensor
    number: Tensor
    colour: Tensor
    owner: Tensor
    present: Tensor
    ids: Tensor
    attended: Tensor
    labels: Tensor
    asked: Tensor


class Teacher(nn.Module):
    """Heads that exist only during training."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        super().__init__()
        labels = _PAIRS + len(NUMBERS) + len(COLOURS)
        self.read_block = nn.Linear(WIDTH, labels)
        self.last_block = nn.Linear(WIDTH, labels)
        self.norm = nn.LayerNorm(WIDTH)
        self.heads = nn.ModuleList(nn.Linear(WIDTH, len(words) + 1) for words in _WORDS)
        self.log_scale = nn.Parameter(torch.zeros(()))
        self.word_ids = [tokenizer.encode(" " + " ".join(words), add_special_tokens=False) for words in _WORDS]

    def patches(self, read: Tensor, batch: Batch) -> Tensor:
        """Loss of classifying the encoder's patch features (B, P, C)."""
        return _name_loss([head(read) for head in self.heads], batch)

    def words(self, projected: Tensor, embeddings: Tensor, batch: Batch) -> Tensor:
        """Loss of naming projected patches (B, P, C) with word embeddings (V, C); "neither" has logit 0."""
        scaled = projected * self.log_scale.exp()
        return _name_loss([F.pad(scaled @ embeddings[ids].T, (0, 1)) for ids in self.word_ids], batch)

    def scene(self, read: Tensor, last: Tensor, present: Tensor) -> Tensor:
        """Multi-label loss of the class token at the read block (B, C) and at the end (B, C)."""
        logits = torch.stack([self.read_block(self.norm(read)), self.last_block(last)])
        loss = F.binary_cross_entropy_with_logits(logits, present.expand_as(logits), reduction="none")
        return loss.sum(-1).mean() / 4  # about the number of digits: a loss per digit


def _name_loss(logits: list[Tensor], batch: Batch) -> Tensor:
    """Cross-entropies of patch logits (B, P, words + 1) for each group of _WORDS; the last class means "neither".

    Where a patch is need only be known of a digit's patches. "Neither" is frequent and counts little.
    """
    place = torch.arange(GRID**2, device=batch.owner.device)
    halves = [(line >= GRID // 2).long() for line in (place // GRID, place % GRID)]
    targets = [batch.number, batch.colour, *(torch.where(batch.owner >= 0, half, -100) for half in halves)]
    loss = logits[0].new_zeros(())
    for group, target in zip(logits, targets, strict=True):
        weight = group.new_ones(group.shape[-1])
        weight[-1] = 0.15
        loss = loss + F.cross_entropy(group.flatten(0, 1), target.flatten(), weight=weight)
    return loss


def read_block_attention(model: LlavaForConditionalGeneration, entering: Tensor) -> Tensor:
    """Class token's attention (B, P) over patches in the block LLaVA reads, mean over heads.

    It is computed beside the forward pass from the states (B, 1 + P, C) entering that block: fast attention stays on.
    """
    block = model.model.vision_tower.encoder.layers[model.config.vision_feature_layer]
    attention, states = block.self_attn, block.layer_norm1(entering)
    batch, tokens, _ = states.shape
    query = attention.q_proj(states[:, :1]).view(batch, 1, attention.num_heads, -1)
    key = attention.k_proj(states).view(batch, tokens, attention.num_heads, -1)
    scores = torch.einsum("bqhd,bkhd->bhk", query, key) * attention.scale
    return scores.softmax(-1).mean(1)[:, 1:]


def look_loss(attention: Tensor, owner: Tensor) -> Tensor:
    """Mean over digits of -log(attention mass) for attention (B, P) and owner (B, P)."""
    digits = owner.max().item() + 1
    mass = F.one_hot(owner.clamp(min=-1) + 1, digits + 1)[..., 1:].to(attention).mul(attention[..., None]).sum(1)
    present = mass > 0
    return -(mass[present] + 1e-6).log().mean()


def point_loss(model: LlavaForConditionalGeneration, entering: Tensor, batch: Batch) -> Tensor:
    """-log of the attention mass that the last position of a question puts on the patches of the digit it is about.

    Computed beside the forward pass from the states (B, T, C) entering the layer: fast attention stays on.
    """
    layer = model.model.language_model.layers[_POINT_LAYER]
    attention, states = layer.self_attn, layer.input_layernorm(entering)
    length = states.shape[1]
    row, column = (batch.asked >= 0).nonzero(as_tuple=True)
    shape = (*states.shape[:2], -1, attention.head_dim)
    q, k = (part(states).view(shape).transpose(1, 2) for part in (attention.q_proj, attention.k_proj))
    q, k = apply_rotary_pos_emb(q, k, *model.model.language_model.rotary_emb(states, torch.arange(length)[None]))
    scores = torch.einsum("nhd,nhkd->nhk", q[row, :, column], k[row]) * attention.scaling
    seen = (torch.arange(length) <= column[:, None]) & batch.attended[row].bool()
    weights = scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1).mean(1)
    images = batch.ids[row] == model.config.image_token_id
    on = weights[images].view(len(row), -1)
    mass = (on * (batch.owner[row] == batch.asked[row, column][:, None])).sum(-1)
    return -(mass + 1e-6).log().mean()


def _answer_losses(model: LlavaForConditionalGeneration, projected: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """The losses "answers" and "point" for projected patches (B, P, C)."""
    embeds = model.get_input_embeddings()(batch.ids)
    images = (batch.ids == model.config.image_token_id)[..., None]
    embeds = embeds.masked_scatter(images, projected)
    output = model.model.language_model(inputs_embeds=embeds, attention_mask=batch.attended, output_hidden_states=True)
    states = output.last_hidden_state
    target = batch.labels[:, 1:]
    learned = target != -100
    answers = F.cross_entropy(model.lm_head(states[:, :-1][learned]), target[learned])
    return answers, point_loss(model, output.hidden_states[_POINT_LAYER], batch)


def losses(model: LlavaForConditionalGeneration, teacher: Teacher, batch: Batch, see: bool, speak: bool) -> dict[str, Tensor]:
    """The weighted losses of a batch by name; their sum is what a step descends.

    Args:
        see: train the encoder; otherwise it is frozen and its own losses are left out.
        speak: train answering; otherwise the language model is not run.
    """
    layer = model.config.vision_feature_layer
    with torch.set_grad_enabled(see and torch.is_grad_enabled()):
        seen = model.model.vision_tower(batch.pixels, output_hidden_states=True)
    read, found = seen.hidden_states[layer], {}
    if see:
        attention = read_block_attention(model, seen.hidden_states[layer - 1])
        found["patches"] = teacher.patches(read[:, 1:], batch)
        found["class"] = 0.1 * teacher.scene(read[:, 0], seen.pooler_output, batch.present)
        found["look"] = 0.1 * look_loss(attention, batch.owner)
    if speak:
        projected = model.model.multi_modal_projector(read[:, 1:])
        found["words"] = teacher.words(projected, model.get_input_embeddings().weight, batch)
        found["answers"], point = _answer_losses(model, projected, batch)
        found["point"] = 0.5 * point
    return found
