"""A run that is killed at any moment and started again ends as if nothing had happened."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import lt_glue
import lt_pretrain
import lt_squad
from bert_tickets import Busy, Diverged, Stopped, UserError, files
from bert_tickets.cli import parse
from bert_tickets.methods import imp as lottery
from bert_tickets.report.results import read_records
from bert_tickets.runs.directory import failure, is_strict, results, results_lines, seconds
from bert_tickets.runs.session import Run
from bert_tickets.training.step import Step

ROOT = Path(__file__).parent.parent
MAY_DIFFER = {"log.jsonl", "lock"}  # when and where it ran


class Killed(BaseException):
    """Stands for SIGKILL: nothing of ours catches it."""


@pytest.fixture
def script():
    """The script that a test is of; a test that is parametrised by it is of all three."""
    return "lt_glue.py"


@pytest.fixture
def command(script, commands):
    return [*commands[script], *["--levels", "3", "--rate", "0.25", "--save-steps", "2"]]


SCRIPTS = {"lt_glue.py": (lt_glue, "glue"), "lt_squad.py": (lt_squad, "squad"), "lt_pretrain.py": (lt_pretrain, "mlm")}


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in MAY_DIFFER
    }


@pytest.fixture
def go(script, command, tmp_path, monkeypatch):
    """Run the command in a folder of the test's; `interrupt` patches something first. Returns all files but the log."""
    monkeypatch.setattr(sys, "argv", [script])  # run.json holds it
    module, preset = SCRIPTS[script]

    def run(name: str, *extra: str) -> dict[str, bytes]:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        with monkeypatch.context() as patch:
            patch.chdir(folder)
            module.main(parse(preset, None, [*command, *extra]))
        return contents(folder)

    return run


def dying(function, at: int, *, before: bool = True):
    """`function`, killed at its call number `at`, before or after doing its work."""
    calls = 0

    def call(*arguments, **options):
        nonlocal calls
        calls += 1
        if calls == at and before:
            raise Killed
        result = function(*arguments, **options)
        if calls == at:
            raise Killed
        return result

    return call


def die(go, monkeypatch, step: int, *words: str) -> None:
    """A run in the folder "run", killed at this step of all its levels (six each)."""
    with monkeypatch.context() as patch:
        patch.setattr(Step, "__call__", dying(Step.__call__, step))
        with pytest.raises(Killed):
            go("run", *words)


VARIANTS = [("lt_glue.py", words.split()) for words in ("", "--rewind 3", "--rewind none", "--protocol released")]
VARIANTS += [("lt_squad.py", []), ("lt_pretrain.py", []), ("lt_pretrain.py", ["--protocol", "released"])]


@pytest.mark.parametrize(("script", "variant"), VARIANTS, ids=lambda words: words if isinstance(words, str) else " ".join(words))
def test_killed_at_every_step_in_turn_it_ends_bit_identical(go, monkeypatch, variant):
    """The run dies at its 5th step, is started again, dies at the 5th from there, and so on until it is through."""
    expected = go("undisturbed", *variant)
    deaths = 0
    while True:
        with monkeypatch.context() as patch:
            patch.setattr(Step, "__call__", dying(Step.__call__, 5))
            try:
                found = go("killed", *variant)
                break
            except Killed:
                deaths += 1
    assert deaths >= 3
    assert found == expected


def test_killed_in_its_writes_it_ends_bit_identical(go, monkeypatch):
    """Before and after flushes and renames all through a run that writes every kind of file."""
    variant = ["--rewind", "3"]
    expected = go("undisturbed", *variant)
    for target, name in [(os, "fsync"), (Path, "replace"), (Path, "rename")]:
        for before in (True, False):
            at, done = 1, False
            while not done:
                folder = f"{name}-{at}-{before}"
                with monkeypatch.context() as patch:
                    patch.setattr(target, name, dying(getattr(target, name), at, before=before))
                    try:
                        go(folder, *variant)
                        done = True
                    except Killed:
                        pass
                if not done:
                    assert go(folder, *variant) == expected, folder
                at += 9 if name != "rename" else 1


def test_what_is_renamed_is_on_the_disk_before_and_its_new_name_after(go, monkeypatch):
    """Or a machine that fails leaves a file in place that is empty."""
    flushed, unflushed, moved = set(), set(), 0
    sync, plain, unlink = os.fsync, {name: getattr(Path, name) for name in ("rename", "replace")}, Path.unlink

    def state(place: os.stat_result) -> tuple[int, int]:
        return place.st_ino, place.st_mtime_ns

    def flush(descriptor: int) -> None:
        flushed.add(state(os.fstat(descriptor)))
        unflushed.discard(os.fstat(descriptor).st_ino)
        sync(descriptor)

    def move(name: str, path: Path, target: Path) -> Path:
        nonlocal moved
        moved += 1
        for place in [path, *path.rglob("*")]:
            assert state(place.stat()) in flushed, place
        unflushed.add(target.parent.stat().st_ino)
        return plain[name](path, target)

    def remove(path: Path, **options: bool) -> None:
        assert not unflushed, path  # what takes its place may not be there
        unlink(path, **options)

    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(Path, "unlink", remove)
    for name in plain:
        monkeypatch.setattr(Path, name, lambda path, target, name=name: move(name, path, target))
    go("run", "--rewind", "3", "--keep-models")
    assert moved > 20
    assert not unflushed


@pytest.mark.parametrize("script", SCRIPTS)
def test_sigkill_for_real(script, command, tmp_path):
    """The process itself is killed, twice, at moments of its own choosing."""

    def start(folder: Path) -> subprocess.Popen:
        folder.mkdir(exist_ok=True)
        return subprocess.Popen(
            [sys.executable, str(ROOT / script), *command, "--max-steps", "30"],
            cwd=folder,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    undisturbed = start(tmp_path / "a")
    assert undisturbed.wait(120) == 0
    for pause in (0.1, 0.6):
        process = start(tmp_path / "b")
        (run_dir,) = wait_for(lambda: list((tmp_path / "b").glob("runs/*")))
        before = (run_dir / "log.jsonl").read_text() if (run_dir / "log.jsonl").exists() else ""
        wait_for(
            lambda run_dir=run_dir, before=before: (
                (run_dir / "log.jsonl").exists() and (run_dir / "log.jsonl").read_text() != before
            )
        )
        time.sleep(pause)
        process.kill()
        assert process.wait(30) == -signal.SIGKILL
    assert start(tmp_path / "b").wait(120) == 0
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def wait_for(condition, seconds: float = 60):
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)
    return value


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_sigterm_and_ctrl_c_save_first_and_say_how_to_go_on(go, monkeypatch, number, code, tmp_path):
    plain, calls = Step.__call__, 0
    expected = go("undisturbed", "--save-steps", "999")

    def call(self, batch, lr):
        nonlocal calls
        calls += 1
        if calls == 9:
            os.kill(os.getpid(), number)
        return plain(self, batch, lr)

    with monkeypatch.context() as patch:
        patch.setattr(Step, "__call__", call)
        with pytest.raises(Stopped, match=r"level 1 after step 3, saved in runs/.*the same command goes on") as stop:
            go("stopped", "--save-steps", "999")
    assert stop.value.code == code
    assert list((tmp_path / "stopped").rglob("checkpoint.safetensors"))
    calls = 0
    with monkeypatch.context() as patch:
        patch.setattr(Step, "__call__", plain)
        assert go("stopped", "--save-steps", "999") == expected
    assert not list((tmp_path / "stopped").rglob("checkpoint.safetensors"))


def test_a_signal_that_comes_in_a_finaliser_is_not_lost(go, monkeypatch, tmp_path):
    """Python drops what is raised in one, as in a callback of weakref, with a traceback on the screen."""
    plain, dropped = lottery.prepare, []

    class Thing:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGTERM)

    def prepare(*arguments):
        thing = Thing()
        del thing
        return plain(*arguments)

    expected = go("undisturbed")
    with monkeypatch.context() as patch:
        patch.setattr(lottery, "prepare", prepare)
        patch.setattr(sys, "unraisablehook", dropped.append)
        with pytest.raises(Stopped, match="stopped in level 0 after step 1, saved") as stop:
            go("run")
    assert [type(one.exc_value) for one in dropped] == [Stopped]
    assert stop.value.code == 143
    assert go("run") == expected


def test_a_finished_run_answers_at_once_and_writes_nothing(go, monkeypatch, capsys):
    expected = go("run")
    said = capsys.readouterr().out
    table = said[said.index("level  sparsity") :].splitlines()
    monkeypatch.setattr("bert_tickets.methods.imp.prepare", lambda *_: pytest.fail("it loaded a model"))
    assert go("run") == expected
    assert capsys.readouterr().out.splitlines() == table
    assert table[0].split()[:3] == ["level", "sparsity", "accuracy"]


def test_a_finished_run_is_looked_at_before_it_answers(go, tmp_path, capsys):
    expected = go("run")
    (run_dir,) = (tmp_path / "run" / "runs").iterdir()
    (run_dir / "results.jsonl").write_bytes(b"{}\n")
    assert go("run") == expected
    assert "results.jsonl is damaged or was edited: it is written again from the levels' metrics.json" in capsys.readouterr().out
    (run_dir / "level_02" / "weights.safetensors").unlink()
    go("run")
    assert "level_02/weights.safetensors is missing: " in capsys.readouterr().out
    mask = run_dir / "level_00" / "mask.safetensors"
    mask.write_bytes(mask.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"level_00/mask\.safetensors is damaged"):
        go("run")


@pytest.fixture
def steps(monkeypatch):
    """The steps that are taken, one after another, of all runs of the test."""
    taken, plain = [], Step.__call__

    def counting(*arguments):
        taken.append(len(taken) + 1)
        return plain(*arguments)

    monkeypatch.setattr(Step, "__call__", counting)
    return taken


def test_finished_levels_are_not_trained_again(go, monkeypatch, steps):
    die(go, monkeypatch, 14)
    steps.clear()
    go("run")
    assert len(steps) == 18 - 12  # level 2 from its start: its first checkpoint was not reached


def test_what_a_kill_left_half_written_is_removed(go, monkeypatch, tmp_path):
    expected = go("undisturbed")
    die(go, monkeypatch, 8)
    (run_dir,) = (tmp_path / "run" / "runs").iterdir()
    (run_dir / ".checkpoint.safetensors.elsewhere.1.tmp").write_bytes(b"half")
    (run_dir / ".level_07.tmp").mkdir()  # of a number that this run does not come to
    (run_dir / ".level_07.tmp" / "mask.safetensors").write_bytes(b"half")
    assert go("run") == expected


def test_a_level_that_was_killed_in_its_evaluation_is_not_trained_again(go, monkeypatch, steps):
    expected = go("undisturbed", "--save-steps", "999")
    monkeypatch.setattr("bert_tickets.training.loop.EVALUATION", 0.0)  # in minutes; a level here takes less than a second
    with monkeypatch.context() as patch:
        patch.setattr(lottery, "evaluate", dying(lottery.evaluate, 2))
        with pytest.raises(Killed):
            go("run", "--save-steps", "999")
    steps.clear()
    assert go("run", "--save-steps", "999") == expected
    assert len(steps) == 6  # level 2's


def test_what_a_run_directory_holds(go, tmp_path):
    found = go("run")
    names = {name.split("/", 2)[2] for name in found}
    levels = {f"level_0{level}/{file}" for level in range(3) for file in ("mask.safetensors", "metrics.json")}
    assert names == {"run.json", "results.jsonl", "level_02/weights.safetensors", *levels}
    about = json.loads(next(data for name, data in found.items() if name.endswith("run.json")))
    assert about["config"]["lr"] == 1e-3
    assert about["differs_from_preset"]["levels"] == 3
    assert set(about["fingerprint"]) == {"device", "precision", "model", "init", "head", "architecture", "train", "evaluation"}
    assert {"torch", "transformers", "python"} <= set(about["environment"]["versions"])
    lines = next(data for name, data in found.items() if name.endswith("results.jsonl")).splitlines()
    assert [json.loads(line)["level"] for line in lines] == [0, 1, 2]


def test_a_damaged_checkpoint_is_named_and_the_level_begins_again(go, monkeypatch, capsys, tmp_path):
    expected = go("undisturbed")
    die(go, monkeypatch, 10)
    (checkpoint,) = (tmp_path / "run").rglob("checkpoint.safetensors")
    checkpoint.write_bytes(checkpoint.read_bytes()[:-100])
    assert go("run") == expected
    assert "checkpoint.safetensors is damaged" in capsys.readouterr().out


@pytest.mark.parametrize("file", ["run.json", "level_00/metrics.json", "level_01/weights.safetensors"])
def test_damaged_state_is_named_and_refused(go, monkeypatch, tmp_path, file):
    die(go, monkeypatch, 15)
    (run_dir,) = (tmp_path / "run" / "runs").iterdir()
    data = (run_dir / file).read_bytes()
    (run_dir / file).write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=file.split("/")[-1].replace(".", r"\.") + " is damaged"):
        go("run")


def test_a_changed_model_or_other_data_are_not_mixed_in(go, monkeypatch, tmp_path):
    die(go, monkeypatch, 8)
    (run_dir,) = (tmp_path / "run" / "runs").iterdir()
    about = files.read_checksummed(run_dir / "run.json")
    for key in about["fingerprint"]:
        files.write_checksummed(run_dir / "run.json", about | {"fingerprint": about["fingerprint"] | {key: "another"}})
        with pytest.raises(UserError, match=rf"was begun with {key} .* would mix two runs"):
            go("run")


def test_another_environment_is_said_and_written_down(go, monkeypatch, capsys, tmp_path):
    """It may change the bits, so it is not silent; but a cluster's next node may well be another, so it is not refused."""
    die(go, monkeypatch, 8)
    (run_dir,) = (tmp_path / "run" / "runs").iterdir()
    about = files.read_checksummed(run_dir / "run.json")
    about["environment"]["threads"] = 99
    files.write_checksummed(run_dir / "run.json", about)
    go("run")
    assert "begun with 99: the bits may differ" in capsys.readouterr().out
    events = [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]
    (resume,) = (event for event in events if event["event"] == "resume")
    assert list(resume["changed"]) == ["threads"]


def test_a_torn_line_of_the_log_harms_nothing(go, tmp_path):
    go("run")
    (log,) = (tmp_path / "run").rglob("log.jsonl")
    log.write_text(log.read_text() + '{"event": "le')
    go("run")
    run = Run(parse("glue", None, ["--task", "rte"]), "glue")
    run.dir = log.parent
    run.log("later")
    assert sorted(seconds(log.parent)) == [0, 1, 2]
    assert json.loads(log.read_text().splitlines()[-1])["event"] == "later"


@pytest.fixture
def diverge(go, monkeypatch, tmp_path):
    """Have the run in a folder meet a weight that is not finite, in its second level; returns the run directory."""
    plain = Step.__call__

    def run(name: str) -> Path:
        calls = 0

        def breaking(self, batch, lr):  # the loss of this very step is still finite
            nonlocal calls
            calls += 1
            loss = plain(self, batch, lr)
            if calls == 8:
                self.params["bert.pooler.dense.weight"].data[0, 0] = float("nan")
            return loss

        with monkeypatch.context() as patch:
            patch.setattr(Step, "__call__", breaking)
            with pytest.raises(Diverged, match=r"became infinite or NaN by step 2\. It is no result, and results\.jsonl says so"):
                go(name)
        (found,) = (tmp_path / name / "runs").iterdir()
        return found

    return run


def test_a_level_that_diverges_is_never_saved_and_the_results_say_so(go, diverge, capsys):
    expected, run = go("undisturbed"), diverge("run")
    first, last = map(json.loads, (run / "results.jsonl").read_text().splitlines())
    assert first["level"] == 0
    assert last == {"run": run.name, "task": "rte", "level": 1, "ended": "a weight became infinite or NaN by step 2"}
    assert not (run / "checkpoint.safetensors").exists()
    capsys.readouterr()
    assert go("run") == expected  # it is tried again, and nothing is left of the failure
    out = capsys.readouterr().out
    assert "level 1 came to no result before: a weight became infinite or NaN by step 2; it is tried again" in out
    assert "was edited" not in out


def test_killed_between_a_level_that_was_tried_again_and_its_results_it_says_no_failure(go, diverge, monkeypatch):
    expected = go("undisturbed")
    run = diverge("run")
    with monkeypatch.context() as patch:
        patch.setattr("bert_tickets.runs.session.settle", dying(lambda *_: None, 1))
        with pytest.raises(Killed):
            go("run")
    assert (run / "failure.json").exists()
    assert failure(run) is None
    assert go("run") == expected


@pytest.mark.parametrize("damage", [b"", b"{}", b'{"level": 1, "ended": "all is well", "run": "another"}'])
def test_a_damaged_failure_is_named_and_removed(go, diverge, capsys, damage):
    expected, run = go("undisturbed"), diverge("run")
    (run / "failure.json").write_bytes(damage)
    assert failure(run) is None
    capsys.readouterr()
    assert go("run") == expected
    out = capsys.readouterr().out
    assert "failure.json is damaged" in out
    assert "; it is removed" in out


def test_a_weight_that_ends_infinite_is_no_result_though_no_output_tells(go, monkeypatch):
    plain, calls = Step.__call__, 0

    def breaking(self, batch, lr):
        nonlocal calls
        calls += 1
        loss = plain(self, batch, lr)
        if calls == 6:  # the last of the level
            self.params["bert.embeddings.word_embeddings.weight"].data[0] = float("inf")  # of [PAD], which packing never reads
        return loss

    monkeypatch.setattr(Step, "__call__", breaking)
    with pytest.raises(Diverged, match="a weight became infinite or NaN by step 6"):
        go("run", "--save-steps", "999")


def test_outputs_that_are_not_finite_are_no_result(go, monkeypatch):
    plain = lottery.evaluate
    with monkeypatch.context() as patch:
        patch.setattr(lottery, "evaluate", lambda *arguments: plain(*arguments) * float("inf"))
        with pytest.raises(Diverged, match="outputs on validation are not finite"):
            go("run")
    assert go("run") == go("undisturbed")


def test_a_read_only_archive_of_a_finished_run_still_answers(go, monkeypatch, capsys):
    go("run")
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr("bert_tickets.runs.session.take_lock", lambda path: (_ for _ in ()).throw(PermissionError(13, "no")))
        go("run")
    assert "sparsity" in capsys.readouterr().out


HELD = ["run.json", "level_00/metrics.json", "level_00/mask.safetensors", "level_00/weights.safetensors"]


@pytest.mark.parametrize("name", HELD)
def test_a_flipped_bit_is_never_trained_on_nor_reported(name, go, monkeypatch, tmp_path):
    die(go, monkeypatch, 8)
    (run_dir,) = (tmp_path / "run" / "runs").iterdir()
    data = bytearray((run_dir / name).read_bytes())
    data[len(data) * 2 // 3] ^= 1
    (run_dir / name).write_bytes(data)
    with pytest.raises(UserError, match=f"{name} is damaged"):
        go("run")


def test_a_level_that_is_gone_before_others_is_not_trained_again(go, monkeypatch, tmp_path):
    """It might come to other weights now, and the others would be of none."""
    die(go, monkeypatch, 15)
    (run_dir,) = (tmp_path / "run" / "runs").iterdir()
    shutil.rmtree(run_dir / "level_00")
    with pytest.raises(UserError, match=r"level_00 is missing, and a later level is there.*put back a copy"):
        go("run")


def test_a_newer_run_directory_is_refused(go, tmp_path):
    go("run")
    (about,) = (tmp_path / "run").rglob("run.json")
    files.write_checksummed(about, files.read_checksummed(about) | {"format": 99})
    with pytest.raises(UserError, match="format 99; this version reads up to"):
        go("run")


def as_format_1(run: Path) -> None:
    """Have a run directory be as the first version wrote it: nothing has a checksum, or says which run it is of."""
    for path in sorted(run.rglob("*.json")):
        value = {key: value for key, value in files.read_checksummed(path).items() if key != "run"}
        path.write_text(json.dumps(value | ({"format": 1} if path.name == "run.json" else {}), indent=1, sort_keys=True))
    (run / "results.jsonl").write_bytes(results_lines(run))
    for path in sorted(run.rglob("*.safetensors")):
        info = {key: value for key, value in files.read_info(path).items() if key not in ("checksum", "run")}
        if "facts" in info:
            info["facts"] = json.dumps({key: value for key, value in json.loads(info["facts"]).items() if key != "run"})
        save_file(load_file(path), path, info)


@pytest.mark.parametrize(  # in a level, and before the first step of one
    ("variant", "step"), [("", 9), ("", 13), ("--rewind 3", 9), ("--rewind 3", 10), ("--rewind none", 9), ("--rewind none", 13)]
)
def test_a_run_that_an_older_version_began_is_gone_on_with(go, monkeypatch, tmp_path, variant, step):
    go("undisturbed", *variant.split())
    die(go, monkeypatch, step, *variant.split())
    (run,), (other,) = ((tmp_path / name / "runs").iterdir() for name in ("run", "undisturbed"))
    as_format_1(run)
    assert is_strict(other)
    assert not is_strict(run)
    go("run", *variant.split())
    for ours, theirs in zip(results(run), results(other), strict=True):
        assert {key: value for key, value in theirs.items() if key in ours} == ours
        assert ours["losses"]
    newest = "level_02/weights.safetensors"
    assert load_file(run / newest).keys() == load_file(other / newest).keys()
    assert all(torch.equal(tensor, load_file(other / newest)[name]) for name, tensor in load_file(run / newest).items())
    assert read_records([run])[2].metrics == read_records([other])[2].metrics


def test_a_second_process_is_told_who_holds_the_directory(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = parse("glue", None, command)
    with Run(cfg, "glue"), pytest.raises(Busy, match=f"in use by process {os.getpid()}"), Run(cfg, "glue"):
        pass


@pytest.mark.parametrize("code", ["ENOSPC", "EROFS"])
def test_a_full_or_read_only_disk_ends_the_run_in_words_and_loses_nothing(go, monkeypatch, code):
    import errno

    expected = go("undisturbed")
    number, plain, calls = getattr(errno, code), os.fsync, 0

    def full(descriptor):
        nonlocal calls
        calls += 1
        if calls > 9:
            raise OSError(number, os.strerror(number))
        plain(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        words = {"ENOSPC": "the disk is full", "EROFS": "the file system is read-only"}[code]
        with pytest.raises(UserError, match=f"cannot write .*: {words}"):
            go("run")
    assert go("run") == expected


def test_kept_models_open_in_transformers(go, tmp_path):
    from transformers import AutoModelForSequenceClassification

    go("run", "--keep-models")
    (run_dir,) = (tmp_path / "run" / "runs").iterdir()
    for level in range(3):
        net = AutoModelForSequenceClassification.from_pretrained(run_dir / f"level_0{level}" / "model")
        zeros = (net.bert.encoder.layer[0].output.dense.weight == 0).float().mean()
        assert (zeros > 0.1) == (level > 0)
