"""The command: exit codes, messages, and both demos on small problems."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import gnaflex
from gnaflex import cli
from gnaflex.cli import VERBS, main
from gnaflex.reference import dense_mask
from gnaflex.words import FAILED, INTERRUPTED, OK, USAGE, extents

SOURCE = ["source", "8", "--window", "4"]


def refused(capsys, argv, code):
    """The message of a command that must fail in at most two lines."""
    assert main(argv) == code
    out, err = capsys.readouterr()
    assert not out
    assert "Traceback" not in err
    assert len(err.splitlines()) <= 2
    return err


def verb_that(monkeypatch, action):
    """Let ``gnaflex source`` do something else."""
    verb = next(verb for verb in VERBS if verb.name == "source")._replace(run=action)
    monkeypatch.setattr(cli, "VERBS", (verb,))


# ---- words -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, value",
    [
        ("30x48x80", (30, 48, 80)),
        ("30,48,80", (30, 48, 80)),
        ("4X5", (4, 5)),
        ("21", 21),
        ("-1x8", (-1, 8)),
        ("1xmaxx5", (1, "max", 5)),
        ("maxxmax", ("max", "max")),
        ("max", "max"),
    ],
)
def test_extents(text, value):
    assert extents(text) == value


@pytest.mark.parametrize("text", ["", "x", "8x", "8xx8", "8x-", "1.5", "8 8", "maxmax", "٣x"])
def test_extents_refuses(text, capsys):
    err = refused(capsys, ["source", text, "--window", "4"], USAGE)
    assert "30x48x80" in err


@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: verb.name)
def test_help_of_every_verb_shows_examples_that_parse(verb, capsys):
    assert main([verb.name, "--help"]) == OK
    out = capsys.readouterr().out
    for line in verb.example.splitlines():
        assert line.strip() in out
        program, *words = line.split()
        assert program == "gnaflex"
        assert cli._parser().parse_args(words).run is verb.run


def test_help_names_every_verb(capsys):
    assert main(["--help"]) == OK
    out = capsys.readouterr().out
    assert all(verb.name in out for verb in VERBS)


@pytest.mark.parametrize(
    "argv, says",
    [
        ([], "VERB"),
        (["sorce"], "'source'"),
        (["source", "8"], "--window"),
        (["source", "8", "--window", "9"], "window * dilation must not exceed length"),
        (["source", "8x8", "--window", "4x4x4"], "one entry per axis"),
        ([*SOURCE, "--stride", "5"], "stride must not exceed window"),
        ([*SOURCE, "--causal", "1"], "axes are 0 to 0"),
        (["demo", "--shape", "4x4x4"], "add --video"),
        (["demo", "--video", "--out", "x"], "leave --video out"),
        (["demo", "--video", "--head-dim", "0"], "at least 1"),
        (["demo", "--video", "--dtype", "int8"], "float32"),
        (
            ["demo", "--video", "--shape", "8x8", "--window", "4", "--stride", "1", "--tile-major"],
            "three axes",
        ),
        (["demo", "--size", "256"], "48x48"),
        (["demo", "--noise", "0"], "noise=0.0"),
        (["demo", "--device", "nonsense"], "--device cpu"),
    ],
)
def test_mistakes(argv, says, capsys):
    assert says in refused(capsys, argv, USAGE)


# ---- failures ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "missing, package", [("matplotlib", "matplotlib"), ("PIL", "pillow"), ("rich", "rich")]
)
def test_missing_package(missing, package, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    err = refused(capsys, ["demo"], FAILED)
    assert f"needs {package}" in err
    assert "pip install 'gnaflex[demo]'" in err


def test_a_folder_that_cannot_be_made(capsys, tmp_path):
    (tmp_path / "file").touch()
    err = refused(capsys, ["demo", "--device", "cpu", "--out", str(tmp_path / "file" / "out")], FAILED)
    assert str(tmp_path / "file") in err


@pytest.mark.parametrize(
    "error, code, says",
    [
        (KeyboardInterrupt(), INTERRUPTED, "interrupted."),
        (RuntimeError("no\nlong\nstory"), FAILED, "RuntimeError: no"),
        (RuntimeError(), FAILED, "RuntimeError"),
        (NotImplementedError("no backend\n  flex: reason"), FAILED, "flex: reason"),
        (gnaflex.GNAError("rule.\n  remedy."), USAGE, "remedy."),
        (OSError(28, "No space left on device", "demo.png"), FAILED, "No space left on device: demo.png"),
    ],
    ids=repr,
)
def test_errors(error, code, says, capsys, monkeypatch):
    def fail(options):
        raise error

    verb_that(monkeypatch, fail)
    assert says in refused(capsys, SOURCE, code)


def test_traceback_on_request(capsys, monkeypatch):
    verb_that(monkeypatch, lambda options: 1 / 0)
    assert main([*SOURCE, "--traceback"]) == FAILED
    assert "Traceback" in capsys.readouterr().err


# ---- source ------------------------------------------------------------------------------------------


def test_source(capsys):
    assert main(["source", "8x6", "--window=-1x3", "--dilation", "1xmax", "--causal", "0"]) == OK
    spec = gnaflex.GNA((8, 6), (-1, 3), 1, (1, "max"), (True, False))
    assert capsys.readouterr().out == gnaflex.source(spec)


def test_module_runs():
    done = subprocess.run([sys.executable, "-m", "gnaflex", *SOURCE], capture_output=True, text=True)
    assert (done.stdout, done.stderr, done.returncode) == (gnaflex.source(gnaflex.GNA(8, 4)), "", OK)


def test_a_reader_that_has_gone_is_no_error():
    command = f"set -o pipefail; {sys.executable} -m gnaflex {' '.join(SOURCE)} | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert (done.stderr, done.returncode) == ("", OK)


# ---- the demos ---------------------------------------------------------------------------------------

demo = pytest.importorskip("gnaflex.demo", exc_type=ImportError)
pictures = pytest.importorskip("gnaflex.pictures", exc_type=ImportError)


def complaints(err: str) -> list[str]:
    """Lines on stderr but torch's own, where its CUDA build finds a toolkit and no GPU."""
    return [line for line in err.splitlines() if "No CUDA runtime is found" not in line]


def test_photo_demo(capsys, tmp_path, monkeypatch):
    image = pytest.importorskip("PIL.Image", exc_type=ImportError)
    gains = []
    photo = demo.photo
    monkeypatch.setattr(demo, "photo", lambda **given: gains.append(photo(**given)))
    argv = ["demo", "--size", "48x64", "--seed", "3", "--device", "cpu", "--out", str(tmp_path / "new")]
    assert main(argv) == OK
    out, err = capsys.readouterr()
    assert not complaints(err)
    assert str(tmp_path / "new" / "demo.png") in out.replace("\n", "")
    with image.open(tmp_path / "new" / "demo.png") as picture:
        assert picture.format == "PNG"
        assert picture.width == 1200
    noisy, *others = gains[0].values()
    assert len(others) == 3
    assert min(others) > noisy + 3
    assert all(f"{ratio:.2f} dB" in out for ratio in (noisy, *others))


@pytest.mark.parametrize("order", [[], ["--tile-major"]])
def test_video_demo(order, capsys, monkeypatch):
    monkeypatch.setattr(demo, "flex_attention", gathered)
    argv = [
        "demo",
        "--video",
        "--shape",
        "4x8x8",
        "--window",
        "2x4x4",
        "--stride",
        "2x2x2",
        "--device",
        "cpu",
    ]
    assert main([*argv, "--head-dim", "16", *order]) == OK
    out, err = capsys.readouterr()
    assert not complaints(err)
    for row in ("mask, median", "attention, median", "sparsity", "of the ideal", "largest error"):
        assert row in out
    assert "256 tokens " + ("tile-major" if order else "row-major") in out


def gathered(*args, **options):
    """The door without a compilation."""
    return gnaflex.flex_attention(*args, backend="sdpa", **options)


def test_a_wrong_output_is_not_timed(capsys, monkeypatch):
    def broken(*args, **options):
        return gathered(*args, **options) * 1.001

    monkeypatch.setattr(demo, "flex_attention", broken)
    argv = ["demo", "--video", "--shape", "4x4x4", "--window", "2", "--stride", "1", "--device", "cpu"]
    assert main(argv) == FAILED
    out, err = capsys.readouterr()
    assert "rows differ from float64" in err
    assert "speed-up" not in out


def test_non_local_means_is_a_softmax():
    image = torch.rand(7, 9, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    q, k, v = (x[0, 0] for x in pictures.non_local_means(image, 0.2))
    assert torch.equal(v[:, :3], image.flatten(0, 1))
    features = k[:, : 3 * pictures.PATCH**2]
    squares = torch.cdist(features, features, compute_mode="donot_use_mm_for_euclid_dist").square()
    weights = torch.exp(-squares / 2)
    torch.testing.assert_close(torch.softmax(q @ k.T, 1), weights / weights.sum(1, keepdim=True))


@pytest.mark.parametrize("tile", [None, (2, 4)])
def test_block_kinds_and_counts(tile):
    spec = gnaflex.GNA((7, 10), window=(4, 6), stride=(2, 5), is_causal=(True, False))
    block = None if tile else 8
    bm = gnaflex.block_mask(spec, q_tile=tile, block_size=block, device="cpu")
    mask = dense_mask(spec).double()
    mask = gnaflex.permute(gnaflex.permute(mask, bm).mT, bm).mT
    rows = torch.nn.functional.pad(mask, (0, -mask.shape[1] % 8, 0, -mask.shape[0] % 8))
    allowed = rows.unflatten(1, (-1, 8)).unflatten(0, (-1, 8)).sum((1, 3))
    kinds = torch.from_numpy(pictures.block_kinds(bm))
    assert torch.equal(kinds > 0, allowed > 0)
    assert bool((kinds[allowed == 64] == 2).all())
    counts = pictures.count_blocks(bm)
    assert counts == (int((kinds > 0).sum()), int((kinds == 2).sum()), kinds.numel())
