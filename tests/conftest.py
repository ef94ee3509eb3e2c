"""What several test files share: the embedded model, fresh pictures of two creatures it knows, one
corpus, one trained run."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import settings

# The same examples in every run; other ones are what tests/fuzz is for.
settings.register_profile("same", derandomize=True)
settings.load_profile("same")


@pytest.fixture(scope="session")
def cast(tmp_path_factory) -> SimpleNamespace:
    """target and others (names that the model knows), stranger (one that it does not), and their
    pictures as files; of the target another one, too ("again")."""
    from fastsiu.demo.world import KNOWN, UNSEEN, World, draw

    world = World()
    folder = tmp_path_factory.mktemp("pictures")
    names = {"target": KNOWN[2], "other": KNOWN[6], "stranger": UNSEEN[0]}
    files = {}
    for key, name in names.items():
        files[key] = folder / f"{key}.png"
        draw(world.sketch((name,), f"test {key} 1")).save(files[key])
    files["again"] = folder / "again.png"
    draw(world.sketch((names["target"],), "test target 2")).save(files["again"])
    return SimpleNamespace(**names, others=(KNOWN[6], KNOWN[9]), files=files, image=files["target"])


@pytest.fixture(scope="session")
def demo_dir() -> Path:
    from fastsiu.demo import MODEL_DIR

    return MODEL_DIR


@pytest.fixture(scope="session")
def loaded(demo_dir):
    """The embedded model. Whoever puts an adapter on takes it off again (fixture `adapted`)."""
    import torch

    from fastsiu.model import vlm

    torch.set_num_threads(1)
    return vlm.load(str(demo_dir), device="cpu")


@pytest.fixture(scope="session")
def shown(loaded, cast):
    """The target's picture as the language model sees it."""
    from fastsiu.images import load_image

    return loaded.picture(load_image(cast.image))


@pytest.fixture(scope="session")
def gathered(cast, demo_dir) -> SimpleNamespace:
    """Scene, samples and corpus of one request, on a model of its own; no teacher was run."""
    import calls

    scene, made = calls.samples_for(
        cast.image,
        cast.target,
        model=demo_dir,
        protect=cast.others,
        device="cpu",
        dreams=1,
        strangers=0,
        seed=0,
    )
    return SimpleNamespace(scene=scene, corpus=made, vlm=scene.vlm, recipe=scene.recipe)


@pytest.fixture
def adapted(gathered):
    """`gathered` with an adapter on whose weights are far from zero."""
    import calls

    from fastsiu.model import adapter

    calls.bent(gathered.vlm, gathered.recipe, 0.15)
    yield gathered
    adapter.detach(gathered.vlm)


@pytest.fixture
def cut(monkeypatch):
    """cut(n): models give n tokens at most, whatever they are asked for."""
    from fastsiu.model import ask

    whole = ask.replies

    def shorten(most):
        monkeypatch.setattr(
            ask,
            "replies",
            lambda *given, **options: whole(*given, **{**options, "max_new_tokens": most}),
        )

    return shorten


QUICK = {"steps": 4, "lr": 3e-3, "dreams": 1, "strangers": 0, "seed": 3, "batch_size": 16}


@pytest.fixture(scope="session")
def quick(cast, demo_dir):
    """`unlearn` with few steps on the target; keywords override."""
    import calls

    def call(output_dir, **changes):
        options = {"model": demo_dir, "protect": cast.others, "device": "cpu", **QUICK, **changes}
        image, concept = options.pop("image", cast.image), options.pop("concept", cast.target)
        return calls.unlearn(image, concept, output=output_dir, **options)

    return call


@pytest.fixture(scope="session")
def trained(quick, tmp_path_factory):
    """One finished run: its Result."""
    return quick(tmp_path_factory.mktemp("runs") / "first")


@pytest.fixture
def one_process():
    """one_process(): inside, a process group of this process alone."""
    import contextlib

    import torch

    @contextlib.contextmanager
    def group():
        torch.distributed.init_process_group(
            "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
        )
        try:
            yield
        finally:
            torch.distributed.destroy_process_group()

    return group
