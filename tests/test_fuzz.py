"""Five hundred small damages to valid inputs: each command reads them, or ends with one line.

What is damaged: files of pairs in every format, statements and prompts, a tokenizer's and a model's
files, GGUF, the folder of a run that goes on, and flags. The heavy part of a command is replaced:
it must be reached with numbers that are finite, or not at all.
"""

import contextlib
import copy
import csv
import dataclasses
import gzip
import importlib
import io
import json
import shutil
import sys

import gguf
import jax
import numpy as np
import pyarrow as pa
import pytest
import tokenizers
import tyro
from matplotlib.figure import Figure
from pyarrow import parquet
from tokenizers import decoders, models, pre_tokenizers

from experiments.protocol import inputs, running
from jaxpref import runs
from jaxpref.data.tokenizer import Tokenizer
from jaxpref.models import decoder, paths, pretrained
from jaxpref.score import __main__ as score
from jaxpref.score import pairs as scoring

TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)
SIZES = {"width": 4, "layers": 1, "heads": 1, "kv_heads": 1, "head_width": 4, "mlp_width": 4}
ROWS = [
    {"prompt": "Tea?", "chosen": " Yes.", "rejected": " No."},
    {
        "prompt": [{"role": "user", "content": "Hm?"}],
        "chosen": [{"role": "assistant", "content": "A b"}],
        "rejected": [{"role": "assistant", "content": "B"}],
    },
    {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"},
    {"prompt": "One more", "chosen": " there", "rejected": " where", "score_chosen": 2.5},
]
TABLE = [{"prompt": f"Q{i}?", "chosen": f" a{i}", "rejected": f" b{i} b"} for i in range(4)]
STATEMENTS = [{"statement": f"I keep word {i}.", "matches": i % 2 == 0} for i in range(4)]
PROMPTS = [{"prompt": f"Do {i}.", "label": ("safe", "unsafe")[i % 2]} for i in range(14)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder of valid inputs, each by its name."""
    folder = tmp_path_factory.mktemp("whole")
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    (folder / "pairs.jsonl").write_text(lines)
    with gzip.open(folder / "pairs.jsonl.gz", "wt") as file:
        file.write(lines)
    (folder / "pairs.json").write_text(json.dumps(TABLE))
    with (folder / "pairs.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, TABLE[0])
        writer.writeheader()
        writer.writerows(TABLE)
    parquet.write_table(pa.Table.from_pylist(TABLE), folder / "pairs.parquet")
    for name, rows in (("statements", STATEMENTS), ("prompts", PROMPTS)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for family, positions in (("llama", "rope"), ("gpt2", "learned")):
        write_model(folder / family, family, positions)
    write_gguf(folder / "model.gguf")
    return folder


def a_tokenizer():
    words = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {word: i for i, word in enumerate([*words, "ab", "No", "Never"])}
    merges = [("a", "b"), ("N", "o")]
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "<end>"])
    return Tokenizer(backend, {"bos_token": "<s>", "eos_token": "<end>"}, False, TEMPLATE)


def write_model(folder, family, positions):
    tokenizer, more = a_tokenizer(), {}
    if family == "gpt2":
        more = {"norm": "layer", "qkv_bias": True, "output_bias": True, "mlp_bias": True}
        more |= {"gated": False, "activation": "gelu_tanh"}
    config = decoder.DecoderConfig(
        vocab=tokenizer.vocab, **SIZES, **more, positions=positions, max_positions=64
    )
    random, shapes = np.random.default_rng(0), decoder.abstract(config)[1]
    arrays = {
        path: random.normal(size=shape).astype(np.float32)
        for path, shape in paths.shapes(shapes, config.layers).items()
    }
    params = paths.unflatten(shapes, arrays, config.layers)
    pretrained.save(folder, params, config, family=family, tokenizer=tokenizer)


def write_gguf(path):
    words, vocabulary = sorted(pre_tokenizers.ByteLevel.alphabet()), 260
    writer, random = gguf.GGUFWriter(path, "llama"), np.random.default_rng(0)
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(4)
    writer.add_feed_forward_length(4)
    writer.add_head_count(1)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([*words, "ab", "No", "<s>", "<end>"])
    writer.add_token_types([1] * (vocabulary - 2) + [3, 3])
    writer.add_token_merges(["a b", "N o"])
    writer.add_bos_token_id(vocabulary - 2)
    writer.add_eos_token_id(vocabulary - 1)
    writer.add_chat_template(TEMPLATE)
    shapes = {"token_embd": (vocabulary, 4), "output_norm": (4,)}
    shapes |= {f"blk.0.{n}": (4,) for n in ("attn_norm", "ffn_norm")}
    names = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    shapes |= {f"blk.0.{n}": (4, 4) for n in names}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", random.normal(size=shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# --- damages


DEEP, LONG = "[" * 3000 + "]" * 3000, "9" * 5000
STRANGE = (
    *(None, True, -1, 0, 2**70, 1e300, float("inf"), float("nan"), 0.5),
    *("", " ", "\ud800", "\0", "x" * 3000, "@DEEP", "@LONG", "@LONG.0", [], {}, [[]], [None]),
    *({"role": "user"}, [{"role": "assistant", "content": None}], [{"type": "image"}]),
)


def damaged_bytes(content, random):
    """One change: a byte, a cut, some bytes more, some fewer, some twice."""
    at, kind = int(random.integers(len(content))), random.integers(5)
    some = content[at : at + int(random.integers(1, 9))]
    if kind == 0:
        return (
            content[:at] + bytes([content[at] ^ (1 << int(random.integers(8)))]) + content[at + 1 :]
        )
    if kind == 1:
        return content[:at]
    if kind == 2:
        return content[:at] + random.bytes(int(random.integers(1, 9))) + content[at:]
    return content[:at] + (some + some if kind == 3 else b"") + content[at + len(some) :]


def damaged_json(value, random):
    """One entry anywhere in the tree: gone, under another name, or of another type."""
    value = copy.deepcopy(value)
    places, todo = [], [value]
    while todo:
        node = todo.pop()
        keys = list(node) if isinstance(node, dict) else range(min(len(node), 30))
        for key in keys:
            places.append((node, key))
            if isinstance(node[key], dict | list):
                todo.append(node[key])
    node, key = places[int(random.integers(len(places)))]
    kind, strange = random.integers(4), STRANGE[int(random.integers(len(STRANGE)))]
    if kind == 0:
        del node[key]
    elif kind == 1 and isinstance(node, dict):
        node[f"{key}x"] = node.pop(key)
    elif kind == 2:
        node[key] = [node[key]]
    else:
        node[key] = strange
    return value


def as_text(value):
    text = json.dumps(value)
    for mark, raw in (('"@DEEP"', DEEP), ('"@LONG.0"', f"{LONG}.0"), ('"@LONG"', LONG)):
        text = text.replace(mark, raw)
    return text


def damaged_rows(rows, random):
    rows = list(rows)
    at = int(random.integers(len(rows)))
    rows[at] = damaged_json(rows[at], random)
    return "".join(as_text(row) + "\n" for row in rows)


# --- commands


@contextlib.contextmanager
def settings(value):
    """The command line is not read: these are its settings."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tyro, "cli", lambda *_, **__: value)
        yield


def said(run):
    """None where the command came through, else its one line; any other end fails."""
    code = None
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            run()
        except SystemExit as end:
            code = end.code
    if code in (None, 0):
        return None
    assert isinstance(code, str), code
    assert "\n" not in code
    assert len(code) < 2000, f"{code[:100]}..."
    assert code.isprintable(), repr(code)
    return code


def all_end_well(cases, run):
    """Runs every case; returns how many came through."""
    wrong, through = [], 0
    for case in cases:
        try:
            through += said(lambda case=case: run(case)) is None
        except BaseException as error:
            wrong.append(f"{case}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
    assert not wrong, f"{len(wrong)} of {len(cases)}:\n" + "\n".join(wrong)
    return through


@pytest.fixture(scope="module")
def ready(whole):
    found = pretrained.load(whole / "llama")
    return found._replace(source=whole / "llama")


@pytest.fixture(autouse=True)
def without_the_heavy_part(monkeypatch, tmp_path):
    """A score is a sum of the parameters, and an experiment ends where it would begin to train."""

    def scores(policy, params, encoded, *, columns, places, **_):
        size = sum(float(np.abs(np.asarray(x, np.float64)).sum()) for x in jax.tree.leaves(params))
        size += sum(int(ids.sum()) for pair in encoded for ids in pair.tokens)
        found = {name: np.full(len(encoded), size) for name in columns}
        scoring._check(found, np.arange(len(encoded)), places)
        lengths = dict.fromkeys(("chosen_tokens", "rejected_tokens"), np.arange(len(encoded)))
        (tmp_path / "scores.parquet.parts").mkdir(exist_ok=True)
        return found | lengths

    monkeypatch.setattr(score, "score_pairs", scores)
    monkeypatch.setattr(runs, "_commit", dict)
    monkeypatch.chdir(tmp_path)


def score_of(tmp_path, **options):
    """Runs the command; what it wrote holds numbers."""
    out = tmp_path / "scores.parquet"
    out.unlink(missing_ok=True)
    with settings(score.Options(out=out, **options)):
        score.run()
    for name, column in parquet.read_table(out).to_pydict().items():
        assert np.isfinite(column).all(), name


def damaged(content, name, seed):
    """A file's damaged content."""
    random = np.random.default_rng([seed, *name.encode()])
    rows = {"pairs.jsonl": ROWS, "statements.jsonl": STATEMENTS, "prompts.jsonl": PROMPTS}
    if name in rows and seed % 4:
        return damaged_rows(rows[name], random).encode("utf-8", "surrogatepass")
    if name.endswith((".json", "index")) and seed % 4:
        return as_text(damaged_json(json.loads(content), random)).encode()
    if name == "model.safetensors" and seed % 2:  # its header as text
        size = int.from_bytes(content[:8], "little")
        header = as_text(damaged_json(json.loads(content[8 : 8 + size]), random)).encode()
        return len(header).to_bytes(8, "little") + header + content[8 + size :]
    return damaged_bytes(content, random)


@pytest.mark.parametrize(
    ("name", "number"),
    [("pairs.jsonl", 70), ("pairs.jsonl.gz", 15), ("pairs.json", 25), ("pairs.csv", 20),
     ("pairs.parquet", 40)],
)  # fmt: skip
def test_files_of_pairs(whole, ready, tmp_path, monkeypatch, name, number):
    monkeypatch.setattr(pretrained, "load", lambda *_, **__: ready)
    content = (whole / name).read_bytes()

    def run(seed):
        (tmp_path / name).write_bytes(damaged(content, name, seed))
        bad = ("error", "skip")[seed % 3 > 0]
        score_of(tmp_path, data=str(tmp_path / name), model="any", bad=bad)

    through = all_end_well(range(number), run)
    assert 0 < through < number


@pytest.mark.parametrize(
    ("model", "name", "number"),
    [("llama", "tokenizer.json", 40), ("llama", "tokenizer_config.json", 25),
     ("llama", "config.json", 45), ("llama", "model.safetensors", 35), ("gpt2", "config.json", 30)],
)  # fmt: skip
def test_files_of_models(whole, tmp_path, model, name, number):
    folder = shutil.copytree(whole / model, tmp_path / "model")
    content = (folder / name).read_bytes()

    def run(seed):
        (folder / name).write_bytes(damaged(content, name, seed))
        score_of(tmp_path, data=str(whole / "pairs.jsonl"), model=str(folder))

    assert 0 < all_end_well(range(number), run) < number


def test_gguf_files(whole, tmp_path):
    content = (whole / "model.gguf").read_bytes()
    header = len(content) - 4 * (260 * 4 + 3 * 4 + 7 * 16)
    assert content[:4] == b"GGUF"

    def run(seed):
        random = np.random.default_rng(seed)
        new = damaged_bytes(content[:header], random) + content[header:]
        (tmp_path / "model.gguf").write_bytes(new)
        score_of(tmp_path, data=str(whole / "pairs.jsonl"), model=str(tmp_path / "model.gguf"))

    assert all_end_well(range(60), run) < 60


PARTS = {"pairs": 1, "unseen": 1, "trained": 1, "batch": 1}
EXPERIMENTS = {
    "ches_percentiles": {"pairs": 2, "unseen": 1, "subset": 2, "trained": 1, "batch": 2},
    "displacement": {**PARTS},
    "dose": {**PARTS},
    "entanglement_dynamics": {**PARTS},
    "first_order": {"pairs": 1, "others": 1, "warm": 0},
    "forecast": {**PARTS, "grams": 1},
    "loss_comparison": {"train": 1, "validation": 1, "test": 1, "batch": 1, "limit": 64},
    "mitigations": {**PARTS},
    "suffix_entanglement": {
        "sets": (), "pairs": 1, "unseen": 1, "trained": 1, "grams": 1, "batch": 1,
    },
    "no_vs_never": {"prompts": 1, "pairs": ("a>b",)},
    "unalignment": {"train": 2, "held_out": 1, "safe": 1, "taught": 2, "batch": 2, "new": 90},
}  # fmt: skip
FILES = {"no_vs_never": ("data", "statements.jsonl"), "unalignment": ("prompts", "prompts.jsonl")}


@pytest.fixture
def experiment(ready, monkeypatch):
    """Its package and its command, which stops where it would begin."""

    def stop(*_, **__):
        raise SystemExit(0)

    def opened(name):
        lab = importlib.import_module(f"experiments.{name}")
        program = importlib.import_module(f"experiments.{name}.__main__")
        monkeypatch.setattr(lab, "run", stop)
        monkeypatch.setattr(pretrained, "load", lambda *_, **__: ready)
        monkeypatch.setattr(
            inputs, "open_model", lambda *_, **__: inputs.Subject(*ready[:2], ready.tokenizer)
        )
        return lab, program

    return opened


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiments(whole, experiment, tmp_path, name):
    lab, program = experiment(name)
    field, file = FILES.get(name, ("data", "pairs.jsonl"))
    content = (whole / file).read_bytes()

    def run(seed):
        # A name of its own: what was read may be kept by its path.
        place = tmp_path / f"{seed}{file}"
        place.write_bytes(damaged(content, file, seed))
        values = {field: str(place), "model": f"model{seed}", **EXPERIMENTS[name]}
        values["bad"] = ("error", "skip")[seed % 2]
        found = (lab.Config(**values), running.Options(name=f"run{seed}")), []
        with settings(found):
            program.main()

    assert all_end_well(range(8), run) > 0


def test_the_folder_of_a_run_that_goes_on(tmp_path):
    @dataclasses.dataclass(frozen=True)
    class Config:
        size: int = 3

    def command():
        found = (Config(), running.Options(name="x", resume=True)), []
        with settings(found):
            running.command(
                "toy", Config, description=None, hashes=lambda _: {"data": "ab"},
                run=lambda config, folder: running.kept(folder, "part", lambda: {"x": np.ones(3)}),
                summarise=lambda *_: [{"a": 1.0}], report=lambda *_: "", draw=lambda *_: figure,
                metrics=lambda *_: [{"loss": 1.0}],
            )  # fmt: skip

    figure = Figure()
    assert said(command) is None
    whole = tmp_path / "runs" / "toy" / "x"
    files = ["config.json", "provenance.json", "parts/part.npz"]
    before = {file: (whole / file).read_bytes() for file in files}

    def run(seed):
        for file, content in before.items():
            (whole / file).write_bytes(content)
        file = files[seed % 3]
        (whole / file).write_bytes(damaged(before[file], file, seed // 3))
        command()
        assert np.isfinite(runs.load(whole).arrays["x"]).all()

    all_end_well(range(45), run)


VALUES = (
    "-1",
    "0",
    "nan",
    "inf",
    "-inf",
    "1e400",
    "9" * 25,
    "",
    "x",
    "\udcff",
    "2024-13-01",
    "a=b",
)


@pytest.mark.parametrize("name", ["score", *EXPERIMENTS])
def test_flags(whole, ready, experiment, tmp_path, monkeypatch, name):
    """One setting has a value that it does not expect; what tyro refuses has status 2."""
    lab, program = (score, score) if name == "score" else experiment(name)
    monkeypatch.setattr(pretrained, "load", lambda *_, **__: ready)
    config = score.Options if name == "score" else lab.Config
    fields = [f for f in dataclasses.fields(config) if f.name not in ("out", "model")]
    small = {"data": whole / "pairs.jsonl", "out": tmp_path / "x.parquet"}
    small = small if name == "score" else EXPERIMENTS[name]

    def run(seed):
        random = np.random.default_rng([seed, *name.encode()])
        field = fields[int(random.integers(len(fields)))].name
        value = VALUES[int(random.integers(len(VALUES)))]
        flags = []
        for key, each in {**small, field: value}.items():
            flags += [
                f"--{key.replace('_', '-')}",
                *map(str, each if isinstance(each, tuple) else [each]),
            ]
        if name != "score":
            flags += ["--name", f"run{seed}"]
        monkeypatch.setattr(sys, "argv", [name, *flags])
        try:
            program.run() if name == "score" else program.main()
        except SystemExit as end:
            if end.code != 2:
                raise

    all_end_well(range(6), run)
