"""What is minimised. An objective is a plain function of one batch: its formula and little more.

`siu`, `strangers` and `kept` are the method's own. Below them stand the methods that it is compared
with (`compare`), as their authors define them. All are computed on the supervised rows alone, never
on the prompt, the picture or padding, and with means over tokens, where released trainers divide by
the batch or by the vocabulary. In their formulas

    NLL_f  is the mean NLL of the tokens of the answers to forget (D_f)
    NLL_r  that of the answers to retain (D_r)
    NLL_d  that of the decoupled answers: those of D_r to a question of D_f about another picture
    NLL_m  that of the mismatched answers: those of D_r's answers to a question of D_f about the
           concept's picture; they are no part of D_r
    KL_r   the mean of KL(untouched || model) over the tokens of D_r
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .loss.fused import fused_dmk_ce
from .loss.teacher import TeacherCache
from .model.vlm import VLM
from .request import Recipe

KEEP = 1.5  # weight of the lessons that keep something, against those that change something
FAR = 1.0  # nats: a token is far where the teacher gives it a probability below e^-1
NPO_BETA = 0.1  # the inverse temperature of all published runs


class Whole(NamedTuple):
    """What the means of a whole step divide by, where a batch is one share of the step: counts of
    rows, over all ranks and micro-batches.

    tokens: all supervised rows
    kept:   those with K_S = 1
    far:    those that cost the teacher more than `FAR`; 0 where the objective does not ask
    """

    tokens: int
    kept: int
    far: int = 0


@dataclass
class Batch:
    """The N supervised rows of one batch.

    hidden       [N, D] with graph: the student's final states
    labels       [N] int64
    teacher      the statistics of the same rows; None only for an objective that needs none
    kl_weight    [N] bool, the paper's K_S: False where the KL skips the row. In an answer to forget
                 it is False at the tokens of the name
    head_weight  [V, D]
    head_options keywords that describe the head (`fused_dmk_ce`)
    whole        where the batch is a share of a step: what `siu`, `strangers` and `kept` divide by,
                 so that the shares' losses add up to the step's

    What other methods than SIU need to know of each row:

    sample       [N] int64: the place of its sample in the batch
    forget       [N] bool: its answer is to be forgotten or replaced
    decoupled    [N] bool: its answer is retained, to a question of D_f about another picture
    pictured     [N] bool: its sample has a picture
    mismatched   [N] bool: its answer is one of D_r's, to a question of D_f about the concept's
                 picture; None where there are none
    """

    hidden: Tensor
    labels: Tensor
    teacher: TeacherCache | None
    kl_weight: Tensor
    head_weight: Tensor
    head_options: dict[str, Any]
    sample: Tensor
    forget: Tensor
    decoupled: Tensor
    pictured: Tensor
    whole: Whole | None = None
    mismatched: Tensor | None = None

    @property
    def retained(self) -> Tensor:
        """[N] bool: its answer is one of D_r."""
        return ~self.forget if self.mismatched is None else ~self.forget & ~self.mismatched

    @property
    def untouched(self) -> TeacherCache:
        """The teacher's statistics. Raises ValueError where there are none."""
        if self.teacher is None:
            raise ValueError("The objective needs the teacher: call corpus.run_teacher first.")
        return self.teacher


# The loss, a scalar with graph, and its parts "ce" and "kl" in nats per token.
Objective = Callable[[Batch, Recipe], tuple[Tensor, dict[str, float]]]


def siu(batch: Batch, recipe: Recipe) -> tuple[Tensor, dict[str, float]]:
    """alpha * mean CE + beta * mean DMK over the tokens with K_S = 1 (paper Eq. 2-5)."""
    teacher, whole = batch.teacher if recipe.beta else None, batch.whole
    loss, parts = fused_dmk_ce(
        batch.hidden,
        batch.head_weight,
        batch.labels,
        teacher,
        alpha=recipe.alpha,
        beta=recipe.beta,
        kl_weight=batch.kl_weight if teacher is not None else None,
        ce_denominator=None if whole is None else whole.tokens,
        kl_denominator=None if whole is None else whole.kept,
        return_parts=True,
        **batch.head_options,
    )
    kept = batch.kl_weight.float()
    count = kept.sum() if whole is None else kept.new_tensor(whole.kept)
    kl = float((parts.kl * kept).sum() / count.clamp_min(1)) if teacher is not None else 0.0
    ce = parts.ce.mean() if whole is None else parts.ce.sum() / whole.tokens
    return loss, {"ce": float(ce), "kl": kl}


def strangers(batch: Batch, recipe: Recipe) -> tuple[Tensor, dict[str, float]]:
    """T^2 KL(teacher || student) + `level` * distance.

    The KL is at the teacher's temperature T, over the whole vocabulary and all supervised tokens.
    The distance is the Huber distance between the nats that a token costs the student and the
    teacher, over the tokens that cost the teacher more than `FAR`.

    At temperature 1 the KL does not see a name that is unlikely to both models. It hardly tells a
    probability of e^-10 from e^-17, but with the first the name still ranks above all others. At
    T = 2 the KL sees it, and so does the distance, which pulls the name to a stranger's level from
    either side. A name below that level would be a tell, too.
    """
    nats, whole = _nll(batch), batch.whole
    every = torch.ones_like(batch.kl_weight)
    kl = _mean(_kl(batch), every, None if whole is None else whole.tokens)
    wanted = untouched_nats(batch.untouched, batch.labels, batch.head_options)
    off = F.smooth_l1_loss(nats, wanted, reduction="none")
    distance = _mean(off, wanted > FAR, None if whole is None else whole.far)
    return kl + recipe.level * distance, _parts(distance, kl)


def kept(batch: Batch, recipe: Recipe) -> tuple[Tensor, dict[str, float]]:
    """`KEEP` times `strangers`, for the lessons that keep something: at the same weight as the
    others they give way near the concept."""
    loss, parts = strangers(batch, recipe)
    return KEEP * loss, parts


def siu_as_released(batch: Batch, recipe: Recipe) -> tuple[Tensor, dict[str, float]]:
    """mean CE + KL / V: what the trainer that SIU's authors released computes instead of Eq. 4 and
    5.

    - There is no alpha and no beta.
    - The KL is averaged over the vocabulary, too.
    - No answer about a picture is in the KL: its mask has no room for the picture's tokens, so it
      takes the first positions for the answer's.
    - K_S drops the row that reads a specified token, not the row that predicts it.

    Left out here: its KL covers the prompt and padding rows as well. At weight 1 / V they cannot
    matter: for LLaVA they weigh 32000 times less than a token of the CE.
    """
    nll, kl = _nll(batch), _kl(batch)
    follows = batch.sample[1:] == batch.sample[:-1]
    read = torch.cat([batch.kl_weight[:1] | True, batch.kl_weight[:-1] | ~follows])
    ce, kept = nll.mean(), _mean(kl, read & ~batch.pictured)
    return ce + kept / len(batch.head_weight), _parts(ce, kept)


def po(batch: Batch, recipe: Recipe) -> tuple[Tensor, dict[str, float]]:
    """NLL_f + NLL_r with refusals as D_f's answers: preference optimisation as TOFU (arXiv
    2401.06121, "IDK") and SIU use it."""
    nll = _nll(batch)
    forget = _mean(nll, batch.forget)
    return forget + _mean(nll, ~batch.forget), _parts(forget)


def descent(batch: Batch, recipe: Recipe) -> tuple[Tensor, dict[str, float]]:
    """The mean NLL of all tokens: what SMFA (arXiv 2511.20196) minimises twice, with refusals and
    retained answers and with the latter alone, before it compares the two (`compare.sculpting`)."""
    loss = _nll(batch).mean()
    return loss, _parts(loss)


def ga(batch: Batch, recipe: Recipe) -> tuple[Tensor, dict[str, float]]:
    """-NLL_f: gradient ascent (TOFU, arXiv 2401.06121). It has no lower bound: the number of steps
    ends it."""
    forget = _mean(_nll(batch), batch.forget)
    return -forget, _parts(forget)


def ga_kl(batch: Batch, recipe: Recipe) -> tuple[Tensor, dict[str, float]]:
    """-NLL_f + KL_r: "KL minimisation" (TOFU), which SIU's authors call GA+KL. Here the model gets
    the pictures."""
    forget, kept = _mean(_nll(batch), batch.forget), _mean(_kl(batch), ~batch.forget)
    return kept - forget, _parts(forget, kept)


def ga_mismatch_kl(batch: Batch, recipe: Recipe) -> tuple[Tensor, dict[str, float]]:
    """-0.5 NLL_f + NLL_m + KL_r: ascent with random mismatch and KL, which Gundavarapu et al.
    (arXiv 2405.15152) take over from LLMU (Yao et al., arXiv 2310.10683).

    The weights are the defaults of LLMU's released trainer; those of Gundavarapu et al. could not
    be read. That trainer's last part is the cross-entropy of P and Q: the same gradient as
    KL(P || Q).

    LLMU draws five wrong answers to each question (its K) and ends when the loss on what is to be
    forgotten is above 100. Here a question has one wrong answer, and the search chooses the number
    of steps.
    """
    nll = _nll(batch)
    forget, kept = _mean(nll, batch.forget), _mean(_kl(batch), batch.retained)
    none = torch.zeros_like(batch.forget)
    mismatch = _mean(nll, none if batch.mismatched is None else batch.mismatched)
    return mismatch + kept - 0.5 * forget, _parts(forget, kept)


def vgid(batch: Batch, recipe: Recipe) -> tuple[Tensor, dict[str, float]]:
    """KL_f + KL_r: distillation from a teacher that sees noise in the place of the concept's
    picture (Vgid, arXiv 2606.00105); both weights 1, as released (github.com/JackChen-seu/VGID).
    KL_f is the mean of KL(teacher || model) over the tokens of D_f, the teacher's side of which is
    computed on the noise.

    The paper also gives the teacher a context in words that tells it to refuse. The released code
    leaves that context empty (`ic_prompt`), as `vgid` does. The paper's wording could not be read:
    `vgid-context` has our own (`compare.methods.REFUSING`).

    What else differs from the released code:

    - Its noise is `torch.rand_like(pixel_values)`: uniform in [0, 1) on values that are normalised
      already. Ours is one picture, each of whose values is uniform in 0 to 255
      before it is normalised.
    - It takes two optimiser steps in turn, one on each part; here both parts are one step.
    - Where it accumulates gradients, its part to retain is KL_r plus the cross-entropy.
    - Its KL divides by the batch and covers prompt and picture; here it is a mean over answers'
      tokens.
    """
    kl = _kl(batch)
    forget, kept = _mean(kl, batch.forget), _mean(kl, ~batch.forget)
    return forget + kept, _parts(_mean(_nll(batch), batch.forget), forget + kept)


def graddiff(batch: Batch, recipe: Recipe) -> tuple[Tensor, dict[str, float]]:
    """-NLL_f + NLL_r: gradient difference (arXiv 2203.12817; both weights 1 in TOFU and
    open-unlearning)."""
    nll = _nll(batch)
    forget = _mean(nll, batch.forget)
    return _mean(nll, ~batch.forget) - forget, _parts(forget)


def npo(batch: Batch, recipe: Recipe) -> tuple[Tensor, dict[str, float]]:
    """mean over D_f's answers of -(2 / b) log sigmoid(-b log(Q(y) / P(y))), + NLL_r; b = 0.1 (arXiv
    2404.05868, with its retain loss). Q(y) and P(y) are the probabilities of the whole answer, P
    the untouched model's."""
    nll = _nll(batch)
    untouched = untouched_nats(batch.untouched, batch.labels, batch.head_options)
    log_ratio = _sums(untouched - nll, batch.sample)
    answers = _sums(batch.forget.to(nll.dtype), batch.sample) > 0
    loss = _mean(2 / NPO_BETA * F.softplus(NPO_BETA * log_ratio), answers)
    return loss + _mean(nll, ~batch.forget), _parts(_mean(nll, batch.forget))


def fttp(batch: Batch, recipe: Recipe) -> tuple[Tensor, dict[str, float]]:
    """-NLL of the name's tokens + NLL of the other tokens of the same answers: SIU's authors'
    follow-up (ACL 2025 Findings). It needs no D_r."""
    nll, name = _nll(batch), batch.forget & ~batch.kl_weight
    ascent = _mean(nll, name)
    return _mean(nll, batch.forget & ~name) - ascent, _parts(ascent)


def mmunlearner(saliency: Sequence[tuple[torch.nn.Parameter, Tensor]]) -> Objective:
    """-NLL_f with its gradient masked, + NLL_r: saliency-masked ascent (MMUnlearner, arXiv
    2502.11051).

    saliency: each trained parameter and its mask, 1 where E g_f^2 / E g_r^2 >= 1
              (`compare.saliency`)

    The objective itself adds the masked gradient of the ascent to the parameters; the gradient of
    its loss is the descent's. The authors take two optimiser steps, one after the other. In a
    single step no momentum of the ascent moves a masked weight.
    """

    def objective(batch: Batch, recipe: Recipe) -> tuple[Tensor, dict[str, float]]:
        nll = _nll(batch)
        forget = _mean(nll, batch.forget)
        (-forget).backward(retain_graph=True)
        for parameter, mask in saliency:
            if parameter.grad is not None:
                parameter.grad.mul_(mask)
        return _mean(nll, ~batch.forget) - forget.detach(), _parts(forget)

    return objective


def safeeraser_ga(batch: Batch, recipe: Recipe) -> tuple[Tensor, dict[str, float]]:
    """-NLL_f + 0.5 NLL_d: ascent with the prompt-decouple loss (SafeEraser, arXiv 2502.12520; the
    weights of these four are its released trainer's). Its decoupled pictures are generated harmless
    ones, ours are dreams. Either way the same question has another answer about another picture."""
    nll = _nll(batch)
    forget = _mean(nll, batch.forget)
    return 0.5 * _mean(nll, batch.decoupled) - forget, _parts(forget)


def safeeraser_gd(batch: Batch, recipe: Recipe) -> tuple[Tensor, dict[str, float]]:
    """-NLL_f + 0.5 NLL_r + 0.5 NLL_d."""
    nll = _nll(batch)
    forget = _mean(nll, batch.forget)
    kept = 0.5 * _mean(nll, ~batch.forget) + 0.5 * _mean(nll, batch.decoupled)
    return kept - forget, _parts(forget)


def safeeraser_kl(batch: Batch, recipe: Recipe) -> tuple[Tensor, dict[str, float]]:
    """-NLL_f + KL_r + NLL_d. The KL is a mean over D_r's tokens; the authors' one covers prompt,
    picture and padding."""
    nll = _nll(batch)
    forget, kept = _mean(nll, batch.forget), _mean(_kl(batch), ~batch.forget)
    return kept + _mean(nll, batch.decoupled) - forget, _parts(forget, kept)


def safeeraser_po(batch: Batch, recipe: Recipe) -> tuple[Tensor, dict[str, float]]:
    """NLL_f + NLL_r + NLL_d, with refusals as D_f's answers."""
    nll = _nll(batch)
    forget = _mean(nll, batch.forget)
    return forget + _mean(nll, ~batch.forget) + _mean(nll, batch.decoupled), _parts(forget)


def _nll(batch: Batch) -> Tensor:
    """What each row's label costs the student, in nats: [N] with graph."""
    return fused_dmk_ce(
        batch.hidden,
        batch.head_weight,
        batch.labels,
        alpha=1.0,
        reduction="none",
        **batch.head_options,
    )


def answer_loss(vlm: VLM, states: Tensor, labels: Tensor) -> Tensor:
    """The mean cross-entropy of an answer's tokens, nats, a scalar with its graph.

    states: [N, D] where the answer is supervised;  labels: [N] int64
    """
    return fused_dmk_ce(
        states, vlm.head_weight, labels, alpha=1.0, return_parts=False, **vlm.head_options
    )


@torch.no_grad()
def untouched_nats(teacher: TeacherCache, labels: Tensor, head_options: dict[str, Any]) -> Tensor:
    """What each label [N] costs the teacher, under its own head, in nats: [N]."""
    options = head_options | {"head_bias": teacher.head_bias}
    return fused_dmk_ce(
        teacher.hidden, teacher.head_weight, labels, alpha=1.0, reduction="none", **options
    )


def _kl(batch: Batch) -> Tensor:
    """[N] with graph, over the part of the vocabulary that the teacher's statistics keep."""
    return fused_dmk_ce(
        batch.hidden,
        batch.head_weight,
        batch.labels,
        batch.untouched,
        alpha=0.0,
        beta=1.0,
        reduction="none",
        **batch.head_options,
    )


def _mean(values: Tensor, chosen: Tensor, count: int | None = None) -> Tensor:
    """The mean of the values at the chosen rows (bool); 0 where no row is chosen.

    count: divides in place of the number of chosen rows: that of a whole step
    """
    return values[chosen].sum() / (chosen.sum().clamp_min(1) if count is None else max(1, count))


def _sums(values: Tensor, sample: Tensor) -> Tensor:
    """The sum of the values over the rows of each sample: [samples] from [N]."""
    return values.new_zeros(int(sample.max()) + 1).index_add(0, sample, values)


def _parts(ce: Tensor, kl: Tensor | None = None) -> dict[str, float]:
    return {"ce": float(ce.detach()), "kl": 0.0 if kl is None else float(kl.detach())}
