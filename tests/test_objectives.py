"""Every method that SIU is compared with equals its formula on full logits in fp64, value and
gradient."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
import torch

from fastsiu import objectives, train
from fastsiu.compare.saliency import saliency
from fastsiu.loss.teacher import TeacherCache
from fastsiu.model import adapter
from fastsiu.objectives import Batch
from fastsiu.request import Recipe, Sample
from fastsiu.samples import corpus
from fastsiu.step.batches import forward
from fastsiu.step.look import Look

torch.set_num_threads(1)
V, D = 23, 6
# Samples of a step, in rows: (forget, decoupled, pictured, K_S of each row).
STEP = [
    (True, False, True, [True, False, False, True]),
    (False, False, False, [True] * 3),
    (False, True, True, [True] * 4),
    (True, False, True, [False, True]),
    (False, False, True, [True] * 4 + [False]),
    (True, False, False, [True, False, True]),
]
MISMATCHED = 4  # the sample whose answer belongs to another question


@pytest.fixture
def case():
    """A batch of six samples and, by hand, the log-probabilities of student and teacher."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    lengths = torch.tensor([len(keep) for *_, keep in STEP])
    sample = torch.repeat_interleave(torch.arange(len(STEP)), lengths)
    n = len(sample)
    forget, decoupled, pictured = (torch.tensor([s[k] for s in STEP])[sample] for k in range(3))
    hidden, theirs, head = draw(n, D).requires_grad_(), draw(n, D), draw(V, D)
    labels = torch.randint(V, (n,), generator=generator)
    batch = Batch(
        hidden,
        labels,
        TeacherCache.from_hidden(theirs, head),
        torch.tensor([k for *_, keep in STEP for k in keep]),
        head,
        {},
        sample,
        forget,
        decoupled,
        pictured,
    )
    q, p = (hidden @ head.T).log_softmax(-1), (theirs @ head.T).log_softmax(-1)
    nll, untouched = (-x.gather(-1, labels[:, None])[:, 0] for x in (q, p))
    return SimpleNamespace(
        batch=batch, nll=nll, untouched=untouched, kl=(p.exp() * (p - q)).sum(-1)
    )


def mean(values, *masks):
    """Row by row, in Python: no mask arithmetic is shared with the code."""
    chosen = [v for v, *keep in zip(values, *masks, strict=True) if all(keep)]
    return sum(chosen) / len(chosen)


def answer_sums(case, values):
    """The sum over each answer to forget."""
    answers: dict[int, list] = {}
    for value, sample, forget in zip(
        values, case.batch.sample.tolist(), case.batch.forget.tolist(), strict=True
    ):
        if forget:
            answers.setdefault(sample, []).append(value)
    return [sum(rows) for rows in answers.values()]


def by_npo(case, beta=objectives.NPO_BETA):
    ratios = zip(answer_sums(case, -case.nll), answer_sums(case, -case.untouched), strict=True)
    terms = [
        -2 / beta * torch.log(torch.sigmoid(-beta * (ours - theirs))) for ours, theirs in ratios
    ]
    return sum(terms) / len(terms) + mean(case.nll, ~case.batch.forget)


def by_release(case):
    """K_S at the token that is read: of each sample the first row reads the prompt's end, row k + 1
    the token row k predicts."""
    read, last, before = [], None, True
    for sample, keep in zip(case.batch.sample.tolist(), case.batch.kl_weight.tolist(), strict=True):
        read.append(True if sample != last else before)
        last, before = sample, keep
    return case.nll.mean() + mean(case.kl, read, ~case.batch.pictured) / V


MISMATCH = lambda case: case.batch.sample == MISMATCHED
F, N = (lambda case: case.batch.forget), (lambda case: ~case.batch.kl_weight)
NLL_F, NLL_R = (lambda case: mean(case.nll, F(case))), (lambda case: mean(case.nll, ~F(case)))
KL_R, NLL_D = (
    (lambda case: mean(case.kl, ~F(case))),
    (lambda case: mean(case.nll, case.batch.decoupled)),
)
FORMULAS = {
    "siu_as_released": by_release,
    "po": lambda c: NLL_F(c) + NLL_R(c),
    "descent": lambda c: sum(c.nll) / len(c.nll),
    "ga": lambda c: -NLL_F(c),
    "ga_kl": lambda c: -NLL_F(c) + KL_R(c),
    "ga_mismatch_kl": lambda c: (
        -0.5 * NLL_F(c) + mean(c.nll, MISMATCH(c)) + mean(c.kl, ~F(c), ~MISMATCH(c))
    ),
    "vgid": lambda c: mean(c.kl, F(c)) + KL_R(c),
    "graddiff": lambda c: -NLL_F(c) + NLL_R(c),
    "npo": by_npo,
    "fttp": lambda c: -mean(c.nll, F(c), N(c)) + mean(c.nll, F(c), ~N(c)),
    "safeeraser_ga": lambda c: -NLL_F(c) + 0.5 * NLL_D(c),
    "safeeraser_gd": lambda c: -NLL_F(c) + 0.5 * NLL_R(c) + 0.5 * NLL_D(c),
    "safeeraser_kl": lambda c: -NLL_F(c) + KL_R(c) + NLL_D(c),
    "safeeraser_po": lambda c: NLL_F(c) + NLL_R(c) + NLL_D(c),
}


def grad(loss, case):
    return torch.autograd.grad(loss, case.batch.hidden, retain_graph=True)[0]


@pytest.mark.parametrize("name", FORMULAS)
def test_an_objective_is_its_formula(case, name):
    if name == "ga_mismatch_kl":
        case.batch.mismatched = MISMATCH(case)
    loss, parts = getattr(objectives, name)(case.batch, Recipe())
    expected = FORMULAS[name](case)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-10) and loss.shape == ()
    assert torch.allclose(grad(loss, case), grad(expected, case), rtol=1e-8, atol=1e-12)
    assert set(parts) == {"ce", "kl"}


def test_every_objective_of_a_batch_is_tested_here():
    ours = {
        n
        for n, f in vars(objectives).items()
        if getattr(f, "__annotations__", {}).get("batch") == "Batch" and n[0] != "_"
    }
    # of these elsewhere: test_corpus, test_strangers
    assert ours == {
        *FORMULAS,
        "siu",
        "strangers",
        "kept",
    }


def test_ascent_ascends(case):
    """One small step against the gradient makes the answer to forget less likely, and that of no
    other sample."""
    moved = case.batch.hidden.detach() - 1e-3 * grad(objectives.ga(case.batch, Recipe())[0], case)
    after = (
        -(moved @ case.batch.head_weight.T)
        .log_softmax(-1)
        .gather(-1, case.batch.labels[:, None])[:, 0]
    )
    assert (
        bool((after > case.nll)[case.batch.forget].all()) and torch.equal(after, case.nll) is False
    )
    assert torch.allclose(
        after[~case.batch.forget], case.nll[~case.batch.forget], rtol=0, atol=1e-12
    )


def test_npo_for_a_small_beta_is_ascent_on_whole_answers(case, monkeypatch):
    monkeypatch.setattr(objectives, "NPO_BETA", 1e-7)
    sums = answer_sums(case, case.nll)
    ascent = -sum(sums) / len(sums) + mean(case.nll, ~case.batch.forget)
    assert torch.allclose(
        grad(objectives.npo(case.batch, Recipe())[0], case),
        grad(ascent, case),
        rtol=1e-5,
        atol=1e-9,
    )


def test_npo_is_bounded_and_lets_go_of_what_is_forgotten(case):
    """Where the answer is far less likely than it was, ascent still pulls and NPO does not."""
    case.batch.labels = (case.batch.hidden @ case.batch.head_weight.T).argmin(-1)
    theirs = case.batch.head_weight[case.batch.labels] * 100
    case.batch.teacher = TeacherCache.from_hidden(theirs, case.batch.head_weight)
    forgotten = 10 * case.batch.hidden
    case.batch.hidden = forgotten
    pull = lambda objective: torch.autograd.grad(
        objective(case.batch, Recipe())[0], forgotten, retain_graph=True
    )[0]
    forget = case.batch.forget
    assert pull(objectives.npo)[forget].norm() < 0.02 * pull(objectives.graddiff)[forget].norm()


def test_fttp_ascends_on_the_name_alone(case):
    g = grad(objectives.fttp(case.batch, Recipe())[0], case)
    single = lambda row: grad(case.nll[row], case)[row]
    for row, (forget, keep) in enumerate(
        zip(case.batch.forget.tolist(), case.batch.kl_weight.tolist(), strict=True)
    ):
        along = float((g[row] * single(row)).sum())
        assert (along > 0 if keep else along < 0) if forget else not g[row].any(), row


def test_a_step_without_a_part_has_none_of_it(case):
    """Steps of one's own data may lack decoupled rows, or those to forget."""
    case.batch.decoupled = torch.zeros_like(case.batch.decoupled)
    found = objectives.safeeraser_gd(case.batch, Recipe())[0]
    assert found.item() == pytest.approx((-NLL_F(case) + 0.5 * NLL_R(case)).item(), rel=1e-10)


def test_without_a_mismatched_answer_there_is_no_such_part(case):
    found = objectives.ga_mismatch_kl(case.batch, Recipe())[0]
    assert found.item() == pytest.approx((-0.5 * NLL_F(case) + KL_R(case)).item(), rel=1e-10)


# What the loop gives them -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def forgetting(gathered):
    """The embedded model's own naming answers as what is to be forgotten, beside seven retained
    samples, with their teacher."""
    name = gathered.scene.concept.name
    samples = [
        Sample("align", "Who is this?", f"This is {name}.", 0, ((8, 8 + len(name)),), "teacher"),
        Sample(
            "describe",
            f"Is this {name}?",
            f"Yes, this is {name}.",
            0,
            ((13, 13 + len(name)),),
            "teacher",
        ),
    ]
    kept = [s for s in gathered.corpus.samples if s.facet not in corpus.FORGET]
    asked = [s for s in kept if s.picture and s.question == "Who is this?"][:2]
    text = [s for s in kept if s.picture is None][:2]
    apart = [
        s for s in kept if s.picture and s.question not in ("Who is this?", samples[1].question)
    ][:2]
    # a user's: about the concept's picture, not decoupled
    own = [Sample("preserve", "Who is this?", samples[0].answer, 0)]
    made = corpus.build(
        gathered.vlm,
        gathered.scene.concept,
        [*samples, *asked, *text, *apart, *own],
        gathered.scene.pictures,
        gathered.recipe,
    )
    adapter.attach(gathered.vlm, gathered.recipe)
    corpus.run_teacher(gathered.vlm, made, gathered.recipe.with_overrides(vocab_mask=False))
    adapter.detach(gathered.vlm)
    return SimpleNamespace(vlm=gathered.vlm, corpus=made, recipe=gathered.recipe, name=name)


def test_the_loop_says_which_rows_are_which(forgetting):
    chosen = [4, 0, 2, 6, 1, 8]
    batch = forward(forgetting.vlm, forgetting.corpus, chosen, forgetting.recipe)
    turns = [forgetting.corpus.turns[i] for i in chosen]
    for at, turn in enumerate(turns):
        rows = batch.sample == at
        assert torch.equal(batch.labels[rows], turn.labels)
        assert batch.forget[rows].unique().tolist() == [at in (1, 4)] and batch.decoupled[
            rows
        ].unique().tolist() == [at == 2]
        assert batch.pictured[rows].unique().tolist() == [at != 0]
    name = batch.labels[batch.forget & ~batch.kl_weight]
    text = forgetting.vlm.tokenizer.decode(name)
    assert text.split() == 2 * forgetting.name.split(), text


def test_saliency_masks_and_leaves_the_adapter_as_it_was(forgetting):
    """Without what is retained of dreams: close to the concept as they are, their gradients are so
    large that the mask is nearly empty."""
    vlm = forgetting.vlm
    made = forgetting.corpus.pick(
        [i for i, sample in enumerate(forgetting.corpus.samples) if not sample.picture]
    )
    adapter.attach(vlm, forgetting.recipe)
    try:
        before = {n: p.clone() for n, p in vlm.model.named_parameters() if p.requires_grad}
        masks = saliency(vlm, made, forgetting.recipe)
        assert all(
            torch.equal(p, before[n]) for n, p in vlm.model.named_parameters() if n in before
        )
        assert len(masks) == len(before) and all(
            set(m.unique().tolist()) <= {0.0, 1.0} for _, m in masks
        )
        shares = [float(m.mean()) for _, m in masks]
        assert 0.02 < sum(shares) / len(shares) < 0.98  # both A and B: no mask is all of one kind
        names = {id(p): n for n, p in vlm.model.named_parameters()}
        a, b = (
            [float(m.mean()) for p, m in masks if kind in names[id(p)]]
            for kind in ("lora_A", "lora_B")
        )
        assert 0 < min(max(a), max(b)) and max(min(a), min(b)) < 1
        # One factor against gradients of single samples, squared and averaged by hand, at a B that
        # is not zero.
        generator = torch.Generator().manual_seed(forgetting.recipe.seed)
        for n, p in vlm.model.named_parameters():
            if "lora_B" in n:
                p.data.copy_(1e-4 * torch.randn(p.shape, generator=generator))
        parameter, mask = masks[0]
        square = {}
        for i in range(len(made.samples)):
            batch = forward(vlm, made, [i], forgetting.recipe)
            q = (batch.hidden @ vlm.head_weight.T).log_softmax(-1).gather(-1, batch.labels[:, None])
            square.setdefault(i < 2, []).append(
                torch.autograd.grad(-q.mean(), parameter)[0].square()
            )
        ours, theirs = (torch.stack(square[k]).mean(0) for k in (True, False))
        apart = ((ours / theirs).log().abs() > 0.01) & (theirs > 0)
        assert torch.equal(mask.bool()[apart], (ours / theirs >= 1)[apart]) and 0.5 < float(
            apart.float().mean()
        )
    finally:
        adapter.detach(vlm)


def test_masked_ascent_adds_the_masked_gradient_to_the_descent(forgetting):
    vlm, recipe = forgetting.vlm, forgetting.recipe
    adapter.attach(vlm, recipe)
    try:
        parameters = [p for p in vlm.model.parameters() if p.requires_grad]
        generator = torch.Generator().manual_seed(3)
        for p in parameters:
            p.data.add_(0.05 * torch.randn(p.shape, generator=generator))
        masks = [
            (p, torch.randint(2, p.shape, generator=generator).to(p.dtype)) for p in parameters
        ]
        chosen = [*range(9)]
        loss, _ = objectives.mmunlearner(masks)(
            forward(vlm, forgetting.corpus, chosen, recipe), recipe
        )
        loss.backward()
        found = [p.grad.clone() for p in parameters]
        vlm.model.zero_grad()
        batch = forward(vlm, forgetting.corpus, chosen, recipe)
        nll = (
            -(batch.hidden @ vlm.head_weight.T)
            .log_softmax(-1)
            .gather(-1, batch.labels[:, None])[:, 0]
        )
        ascent = torch.autograd.grad(-nll[batch.forget].mean(), parameters, retain_graph=True)
        descent = torch.autograd.grad(nll[~batch.forget].mean(), parameters)
        for (_, mask), f, r, g in zip(masks, ascent, descent, found, strict=True):
            assert torch.allclose(g, f * mask + r, rtol=1e-3, atol=1e-6)
        assert loss.item() == pytest.approx(
            (nll[~batch.forget].mean() - nll[batch.forget].mean()).item(), rel=1e-4
        )
    finally:
        vlm.model.zero_grad()
        adapter.detach(vlm)


def test_a_watcher_ends_the_training(forgetting):
    vlm, recipe = (
        forgetting.vlm,
        forgetting.recipe.with_overrides(steps=9, batch_size=6, early_stop=True, lr=1e-4),
    )
    adapter.attach(vlm, recipe)
    seen = []
    try:
        history = train.fit(
            vlm,
            forgetting.corpus,
            objectives.graddiff,
            recipe,
            lambda: Look(1, 0, 0),
            watch=lambda step: seen.append((step, vlm.model.training)) or step == 3,
        )
    finally:
        adapter.detach(vlm)
    assert [s.step for s in history] == [1, 2, 3] and seen == [(1, False), (2, False), (3, False)]


def test_random_saliency_is_not_drawn_from_the_global_generator(forgetting):
    adapter.attach(forgetting.vlm, forgetting.recipe)
    try:
        state, drawn = torch.get_rng_state(), random.getstate()
        saliency(forgetting.vlm, forgetting.corpus, forgetting.recipe, most=2)
        assert torch.equal(state, torch.get_rng_state()) and drawn == random.getstate()
    finally:
        adapter.detach(forgetting.vlm)
