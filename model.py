"""The network: a transformer that sees, by default, the whole sequence and predicts all of it."""

import math
from dataclasses import dataclass, fields
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# On a CPU, softmax(QK^T)V written out beats PyTorch's fused attention up to this length; where
# `visible` is a mask, in bfloat16 only.
WRITTEN_OUT_UP_TO = 512
LARGEST = 2**25  # block_size times the width of a head: the rotary tables take 256 MiB
LOGITS_AT_ONCE = 2**27  # numbers in memory at a time; 16 times as many to train on a GPU
TILES = {"cuda": 64}  # matrix products are fast where their sizes are multiples of this


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a `Transformer`; every checkpoint stores one.

    `vocab_size` counts the tokens of the data. The mask is one more id, `mask_id == vocab_size`,
    which the network reads and never predicts. Raises `ValueError` for a shape that cannot be
    built.
    """

    vocab_size: int
    block_size: int = 128  # context: the longest sequence, in tokens
    n_layer: int = 4
    n_head: int = 4
    n_embd: int = 128  # width of the residual stream
    dropout: float = 0.0
    tie_weights: bool = True  # the head uses the rows of the embedding
    qk_norm: float = 1.25  # root mean square that queries and keys are brought to; 0: as they are
    attention_gate: bool = False  # a gate for each head; new networks of train.py have them
    conv_width: int = 0  # positions that a short convolution sees; 0 for none
    learned_positions: bool = False  # also a learned vector for each position: for grids
    mlp_size: int = 0  # width of the SwiGLU layer; 0 for 8/3 of n_embd
    norm_eps: float = 1e-5  # of the RMSNorms
    rope_base: float = 10000.0  # pair k of a head turns by position * rope_base**(-2 k / K)
    rope_rounded: bool = False  # its tables in the precision of bfloat16
    block_length: int = 0  # a token sees its block of so many and those before; 0: all see all
    causal: bool = False  # autoregressive: position i is predicted from the positions before it

    def __post_init__(self):
        require_possible(self)

    @property
    def mask_id(self) -> int:
        return self.vocab_size

    @property
    def head_size(self) -> int:
        return self.n_embd // self.n_head

    @property
    def hidden_size(self) -> int:
        """`mlp_size` or, by default, 8/3 of n_embd rounded up to 32s: the weights of a 4x MLP."""
        return self.mlp_size or 32 * math.ceil(8 * self.n_embd / 3 / 32)


def rope_tables(
    length: int, head_size: int, base: float = 10000.0, rounded: bool = False
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary embedding (arXiv 2104.09864), each (length, 1, head_size).

    The first half of a head has the angles with a minus, the second half without. The tables are
    float32: in bfloat16 neighbouring positions would share an angle. `rounded` rounds each cosine
    and sine to bfloat16, for networks that were trained so.
    """
    with torch.device("cpu"):  # also where the model is built on the meta device
        frequencies = base ** (-torch.arange(0, head_size, 2, dtype=torch.float64) / head_size)
        frequencies = torch.cat((-frequencies, frequencies))
        angles = torch.arange(length)[:, None, None] * frequencies  # float64
    cos, sin = angles.cos().float(), angles.sin().float()
    return (cos.bfloat16().float(), sin.bfloat16().float()) if rounded else (cos, sin)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (x[k], x[k + K/2]) of x (..., L, H, K) by their position's angle, in float32.

    cos and sin (L, 1, K) are those of `rope_tables`.
    """
    return (x * cos + x.roll(x.size(-1) // 2, -1) * sin).type_as(x)


def attend(q: Tensor, k: Tensor, v: Tensor, visible=None, causal: bool = False) -> Tensor:
    """Attention of (B, H, L, K) queries, keys and values: full (bidirectional), unless `causal`.

    `visible` are the keys that each query sees: booleans (L, keys), or None for all. It may also be
    a function of q, k and v, which is then used instead: FlexAttention, on a GPU.
    """
    written_out = visible is None or q.dtype == torch.bfloat16
    if q.is_cpu and q.size(2) <= WRITTEN_OUT_UP_TO and written_out:
        scores = (q * q.size(3) ** -0.5) @ k.mT  # (B, H, L, keys)
        if causal:
            visible = torch.ones_like(scores[0, 0], dtype=torch.bool).tril()
        if visible is not None:
            scores = scores.masked_fill(~visible, -math.inf)
        return scores.softmax(dim=-1, dtype=v.dtype) @ v
    if isinstance(visible, Tensor | None):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, is_causal=causal)
    return visible(q, k, v)


class ShortConvolution(nn.Module):
    """x (B, L, D) plus, channel by channel, a weighted sum of its `conv_width` nearest positions.

    It mixes neighbours before attention has learnt to find them (Primer, arXiv 2109.08668). It
    starts as the identity. A causal one looks back only.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        width = config.conv_width
        self.before = width - 1 if config.causal else width // 2
        self.block_length = config.block_length  # for BlockConvolution
        self.weight = nn.Parameter(torch.zeros(width, 1, config.n_embd))

    def forward(self, x: Tensor, *_) -> Tensor:
        taps = self.weight.unbind()  # width times (1, D)
        padded = F.pad(x, (0, 0, self.before, len(taps) - 1 - self.before))
        return x + sum(padded[:, i : i + x.size(1)] * tap for i, tap in enumerate(taps))


class NoConvolution(nn.Identity):
    """In the place of a convolution, so that a `Block` need not ask whether it has any."""

    def forward(self, x: Tensor, *_) -> Tensor:
        return x


class Attention(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd, bias=False)
        if config.attention_gate:  # arXiv 2505.06708
            self.gate = nn.Linear(config.n_embd, config.n_head, bias=False)
        self.out = nn.Linear(config.n_embd, config.n_embd, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, visible=None, cache=None) -> Tensor:
        config = self.config
        q, k, v = self.qkv(x).unflatten(-1, (3, config.n_head, -1)).unbind(2)  # (B, L, H, K) each
        if config.qk_norm:  # bounded attention scores let the hidden matrices take large steps
            q, k = (config.qk_norm * F.rms_norm(z, z.shape[-1:]) for z in (q, k))
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        q, k, v = (z.transpose(1, 2) for z in (q, k, v))  # (B, H, L, K)
        if cache is not None:
            k, v = cache.extend((self, "k"), k), cache.extend((self, "v"), v)
        y = attend(q, k, v, visible, config.causal).transpose(1, 2)  # (B, L, H, K)
        if config.attention_gate:  # a head may also find nothing
            y = y * (2 * self.gate(x).sigmoid())[..., None]
        return self.out(y.flatten(2))


class SwiGLU(nn.Module):
    """Gated MLP (arXiv 2002.05202): out(silu(gate(x)) * up(x)); gate and up are one product."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_up = nn.Linear(config.n_embd, 2 * config.hidden_size, bias=False)
        self.out = nn.Linear(config.hidden_size, config.n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.out(F.silu(gate) * up)


class Block(nn.Module):
    """A layer of the transformer. (The blocks of `block_length` are pieces of the text.)"""

    def __init__(self, config: ModelConfig):
        super().__init__()
        convolution = BlockConvolution if config.block_length else ShortConvolution
        convolution = convolution if config.conv_width else NoConvolution
        self.attention_norm = nn.RMSNorm(config.n_embd, eps=config.norm_eps)
        self.attention_conv = convolution(config)
        self.attention = Attention(config)
        self.mlp_norm = nn.RMSNorm(config.n_embd, eps=config.norm_eps)
        self.mlp_conv = convolution(config)
        self.mlp = SwiGLU(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, visible=None, streams=1, cache=None):
        y = self.attention_conv(self.attention_norm(x), streams, cache)
        x = x + self.dropout(self.attention(y, cos, sin, visible, cache))
        y = self.mlp_conv(self.mlp_norm(x), streams, cache)
        return x + self.dropout(self.mlp(y))


class Transformer(nn.Module):
    """Ids with masks (B, L) in, logits (B, L, V) out; L may be anything up to `block_size`.

    By default there is no causal mask. The time t is no input: the share of masked tokens stands
    for it (RADD, arXiv 2406.03736). The embedding has V + 1 rows, the last for the mask; the head
    has V, so that the mask cannot be predicted.

    With `config.causal` it is an autoregressive network behind the same interface: the prediction
    at position i sees the ids before i only, and the mask's row stands for the start of the text.
    With `config.block_length` a position sees its own block in xt, and the earlier blocks: in
    `targets` if they are given, else in xt, where they have to be clean.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size + 1, config.n_embd)
        if config.learned_positions:
            self.positions = nn.Parameter(torch.zeros(config.block_size, config.n_embd))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = nn.RMSNorm(config.n_embd, eps=config.norm_eps)
        if not config.tie_weights:
            self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.dropout = nn.Dropout(config.dropout)
        self.recompute = False  # activation checkpointing: the backward pass computes blocks again
        self.block_mask = block_mask  # devices.compile_parts has one for FlexAttention
        cos, sin = rope_tables(
            config.block_size, config.head_size, config.rope_base, config.rope_rounded
        )
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.initialise()

    @property
    def device(self) -> torch.device:
        return self.cos.device

    def initialise(self) -> None:
        """Normal weights of deviation 0.02; convolutions stay 0.

        What writes to the residual stream begins smaller by sqrt(2 n_layer).
        """
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                depth = 2 * self.config.n_layer if name.endswith("out.weight") else 1
                nn.init.normal_(parameter, std=0.02 / math.sqrt(depth))

    def hidden(self, xt: Tensor, clean: Tensor | None = None, cache=None) -> Tensor:
        """The final hidden states (B, L, D) of ids (B, L).

        With `config.block_length`, a position sees its own block in xt, and the earlier blocks in
        `clean` (B, L) if that is given: a second stream. Else it sees them in xt and in what a
        `cache` (a `strategies.Cache`) holds of the positions that xt continues. `clean` is not read
        without blocks, nor where xt is a single block.
        """
        L, streams, visible = xt.size(1), 1, None
        start = 0 if cache is None else cache.length
        stop = start + L
        if stop > self.config.block_size:
            raise ValueError(
                f"the input has {stop} tokens but model.block_size is {self.config.block_size}: "
                "shorten it or train with a larger model.block_size"
            )
        if self.config.causal:
            xt = F.pad(xt[:, :-1], (1, 0), value=self.config.mask_id)
        if 0 < self.config.block_length < L:  # else xt is a single block, which sees everything
            block_of = torch.arange(stop, device=xt.device) // self.config.block_length
            if clean is not None:
                xt, streams = torch.cat((xt, clean), dim=1), 2
            visible = self.block_mask(block_of[start:], block_of, streams)
        x = self.embedding(xt)  # (B, streams L, D)
        if self.config.learned_positions:
            x = x + self.positions[start:stop].repeat(streams, 1)
        x = self.dropout(x)
        cos, sin = (table[start:stop].repeat(streams, 1, 1) for table in (self.cos, self.sin))
        for block in self.blocks:
            if self.recompute and self.training:
                block = partial(checkpoint, block, use_reentrant=False)
            x = block(x, cos, sin, visible, streams, cache)
        return self.norm(x[:, :L])

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (..., V) of hidden states (..., D)."""
        V = self.config.vocab_size
        weight = (self.embedding if self.config.tie_weights else self.head).weight
        weight = weight[:V]  # (V, D): without the row of the mask
        if surplus := -V % TILES.get(hidden.device.type, 1):
            return F.linear(hidden, F.pad(weight, (0, 0, 0, surplus)))[..., :V]
        return F.linear(hidden, weight)

    def cross_entropy(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropies (N,) in nats, float32, of hidden states (N, D)."""
        return F.cross_entropy(self.logits(hidden).float(), targets, reduction="none")

    def forward(
        self,
        xt: Tensor,
        targets: Tensor | None = None,
        where: Tensor | None = None,
        capacity: int | None = None,
        cache=None,
    ) -> Tensor:
        """Logits (B, L, V); given `targets` and `where` (B, L), cross-entropies (B, L) in nats.

        The cross-entropies are float32, 0 outside `where`. For them logits are built at the
        positions in `where` alone, in chunks of `LOGITS_AT_ONCE` numbers. `capacity` fixes how many
        positions are computed: static shapes, for torch.compile and for a GPU that need not wait to
        learn their number. It has to be at least where.sum(): tokens beyond it silently cost 0.
        With `config.block_length`, `targets` are also the clean text of the earlier blocks. `cache`
        is for logits only: with `targets` it is not read.
        """
        if targets is None:
            return self.logits(self.hidden(xt, cache=cache))
        hidden = self.hidden(xt, targets)  # (B, L, D)
        capacity = int(where.sum()) if capacity is None else capacity
        chosen = where.flatten().nonzero_static(size=capacity)[:, 0]  # (N,), -1 in unused slots
        used, chosen = chosen >= 0, chosen.clamp(min=0)
        hidden, targets = hidden.flatten(0, 1)[chosen], targets.flatten()[chosen]
        at_once = LOGITS_AT_ONCE * (16 if hidden.is_cuda and hidden.requires_grad else 1)
        chunk = max(1, at_once // self.config.vocab_size)
        cross_entropy = self.cross_entropy
        if len(targets) > chunk:  # the backward pass computes each chunk's logits again
            cross_entropy = partial(
                checkpoint, cross_entropy, use_reentrant=False, preserve_rng_state=False
            )
        nll = torch.cat(list(map(cross_entropy, hidden.split(chunk), targets.split(chunk))))
        flat = nll.new_zeros(where.numel()).index_add(0, chosen, torch.where(used, nll, 0.0))
        return flat.view_as(xt).clone()  # FSDP's hooks warn of a view


# --- Blocks: between diffusion and autoregression (BD3-LM, arXiv 2503.09573) ----------------------


def block_mask(query_block: Tensor, key_block: Tensor, streams: int) -> Tensor:
    """Which keys each query sees (booleans), from the numbers of their blocks (L,).

    With one stream, a position sees its own block and those before. With two, [xt; x0], a position
    of xt sees its own block in xt and the earlier ones in x0; a position of x0 sees its own block
    and the earlier ones in x0.
    """
    own, before = query_block[:, None] == key_block, query_block[:, None] > key_block
    if streams == 1:
        return own | before
    return torch.vstack((torch.hstack((own, before)), torch.hstack((own & False, own | before))))


class BlockConvolution(ShortConvolution):
    """A short convolution that looks ahead to the end of its own block only.

    Before its own block, it reads the clean text: the second of two streams [xt; x0], or the only
    stream, preceded by what the cache holds.
    """

    def forward(self, x: Tensor, streams: int = 1, cache=None) -> Tensor:
        h = self.before
        x = x.unflatten(1, (streams, -1))  # (B, streams, L, D)
        L, y = x.size(2), x
        clean = x[:, -1:] if cache is None else cache.extend(self, x)
        clean = F.pad(clean, (0, 0, h, h))[:, :, -L - 2 * h :]
        own = clean if streams == 1 else F.pad(x, (0, 0, h, h))
        block = torch.arange(-h, L + h, device=x.device) // self.block_length
        for i, tap in enumerate(self.weight.unbind()):  # tap i reads i - h positions to the right
            there = own[:, :, i : i + L]
            if i > h or i < h and streams == 2:  # in other blocks: earlier clean text, or 0 ahead
                is_own = (block[i : i + L] == block[h : h + L])[:, None]
                there = torch.where(is_own, there, clean[:, :, i : i + L] if i < h else 0.0)
            y = y + there * tap
        return y.flatten(1, 2)


# --- Shapes that cannot be built -----------------------------------------------------------------


def require_possible(config: ModelConfig) -> None:
    """Raise `ValueError` for a shape that cannot be built."""
    for field in fields(config):
        value, kind = getattr(config, field.name), field.type
        is_integer = kind is float and isinstance(value, int)  # 1 for 1.0, and True
        if type(value) is not kind and not is_integer:
            raise ValueError(f"model.{field.name}={value!r} is not of type {kind.__name__}")
    positive = ("vocab_size", "block_size", "n_layer", "n_head", "n_embd", "rope_base")
    for name in (*positive, "block_length", "conv_width", "mlp_size", "norm_eps", "qk_norm"):
        limit = int(name in positive)
        if not limit <= getattr(config, name) < math.inf:
            raise ValueError(
                f"model.{name}={getattr(config, name)} must be at least {limit} and finite"
            )
    K = config.head_size
    if config.n_embd % config.n_head:
        raise ValueError(
            f"model.n_embd={config.n_embd} is not divisible by model.n_head={config.n_head}: "
            f"choose a multiple of {config.n_head}"
        )
    if K % 2:
        raise ValueError(
            f"model.n_embd / model.n_head = {K} is odd, but rotary embeddings turn pairs: "
            "choose an even head width"
        )
    if config.block_size * K > LARGEST:
        raise ValueError(
            f"model.block_size={config.block_size} is too long: choose at most {LARGEST // K} "
            f"for heads of width {K}"
        )
    if config.conv_width and config.conv_width % 2 == 0:
        raise ValueError(
            f"model.conv_width={config.conv_width} must be odd, for equally many neighbours on "
            "both sides, or 0 for none"
        )
    if config.block_length and config.block_size % config.block_length:
        raise ValueError(
            f"model.block_length={config.block_length} must divide model.block_size="
            f"{config.block_size}: choose a divisor, or 0 for no blocks"
        )
    if config.block_length and config.causal:
        raise ValueError(
            f"model.block_length={config.block_length} is for training.objective=diffusion: set "
            "it to 0"
        )
    if not 0 <= config.dropout < 1:
        raise ValueError(f"model.dropout={config.dropout} must lie in [0, 1)")
