"""One contract over every network that predicts clean tokens: ``denoiser.log_probs(x) -> log_p``.

V        tokens of the alphabet, 0..V-1; V is the mask
x        int64 tokens [B, L] in 0..V, or a soft state [B, L, V+1]; see core/masking.py
log_p    log-probabilities of the clean tokens [B, L, V], SUBS parametrisation
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from diffdiv.core.masking import subs_log_probs
from diffdiv.models.token_networks import DilatedTokenNet, TransformerTokenNet

#: ``call(net, x) -> logits`` [B, L, >= V]
TokenCall = Callable[[nn.Module, Tensor], Tensor]


def call_token_net(net: nn.Module, x: Tensor) -> Tensor:
    """Logits of a network of models/token_networks.py."""
    logits: Tensor = net(x).logits
    return logits


@dataclass(frozen=True)
class TokenDenoiser:
    """A network that predicts clean tokens.

    Attributes:
        net: may be wrapped (DDP).
        call: how it is called.
        num_tokens: V.
    """

    net: nn.Module
    call: TokenCall
    num_tokens: int

    @property
    def mask_id(self) -> int:
        """V."""
        return self.num_tokens

    def with_net(self, net: nn.Module) -> "TokenDenoiser":
        """The same denoiser around another (copy of the, or wrapped) network."""
        return replace(self, net=net)

    def log_probs(self, x: Tensor) -> Tensor:
        """Log-probabilities of the clean tokens [B, L, V], float32 or better.

        A revealed position has 0 at its token and a very low number elsewhere.
        """
        return subs_log_probs(self.call(self.net, x), x, self.num_tokens)

    def all_masked(self, batch: int, length: int, device: torch.device | str = "cpu") -> Tensor:
        """Where generation starts, [B, L] int64."""
        return torch.full((batch, length), self.mask_id, device=device)


def token_denoiser(net: DilatedTokenNet | TransformerTokenNet) -> TokenDenoiser:
    """Denoiser around one of this library's networks."""
    return TokenDenoiser(net, call_token_net, int(net.config["num_tokens"]))


@dataclass(frozen=True)
class MaskedLanguageCall:
    """How a masked language model of ``transformers`` is called on this library's alphabet.

    Attributes:
        token_ids: the model's id of each of our tokens, [V] int64; a choice of 20 amino acids from
            a protein model's vocabulary, or all ids but the mask.
        mask_id: the model's own id of the mask.
    """

    token_ids: Tensor
    mask_id: int

    def __call__(self, net: nn.Module, x: Tensor) -> Tensor:
        """Logits [B, L, V]; a soft state is embedded as the mixture of its tokens."""
        assert isinstance(net, PreTrainedModel)
        ids = torch.cat([self.token_ids, torch.tensor([self.mask_id])]).to(x.device)
        if x.is_floating_point():
            table: Tensor = net.get_input_embeddings()(ids)
            logits = net(inputs_embeds=x.to(table.dtype) @ table).logits
        else:
            logits = net(input_ids=ids[x]).logits
        return logits[..., ids[:-1]]


def masked_language_denoiser(
    net: PreTrainedModel, *, mask_id: int, token_ids: Sequence[int] | None = None
) -> TokenDenoiser:
    """Denoiser around any masked language model whose output has ``.logits``.

    Args:
        net: of ``transformers``; the logits are taken at their own position, not shifted.
        mask_id: the model's id of the mask (``tokenizer.mask_token_id``).
        token_ids: the model's ids of our tokens 0..V-1, in that order; None: all but the mask.

    Raises:
        ValueError: if an id is outside the model's vocabulary, or the mask is among the tokens.
    """
    size = int(net.config.vocab_size)
    ids = [i for i in range(size) if i != mask_id] if token_ids is None else list(token_ids)
    outside = [i for i in (*ids, mask_id) if not 0 <= i < size]
    if outside or mask_id in ids or len(set(ids)) < len(ids):
        raise ValueError(
            f"token_ids, mask_id: need different ids in 0..{size - 1} with the mask not among the "
            f"tokens; outside: {outside}, mask: {mask_id}"
        )
    return TokenDenoiser(net, MaskedLanguageCall(torch.tensor(ids), mask_id), len(ids))
