from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

import jobs.cli
from jobs.cli import run
from jobs.commands.options import runner_name, storage_options
from jobs.commands.tokenize import make_spec
from schemas.errors import LeaseHeld, SpecError
from schemas.lease import Progress

ROOT = Path(jobs.cli.__file__).parents[1]
COMMANDS = ["tokenize", "resume", "retry", "status", "verify", "inspect", "report", "reconstruct", "import-checkpoint",
            "train", "evaluate", "demo", "train-generator", "generate"]  # fmt: skip


@pytest.fixture
def module(monkeypatch):
    """Puts a module with the given names in the place of one that a command would import."""

    def put(name: str, **names: object) -> None:
        fake = ModuleType(name)
        fake.__dict__.update(names)
        monkeypatch.setitem(sys.modules, name, fake)

    return put


@pytest.fixture
def driver(module):
    """A driver that records how it is called and commits everything at once."""
    calls = []
    progress = Progress(shards=2, committed=2, samples=7, rows=7, tokens=1792, bytes=4032, seconds=1.5)

    def start_job(*arguments, observer, **settings):
        calls.append((arguments, settings))
        observer(progress, "shard 1 is partial")
        return SimpleNamespace(exit_code=3, progress=progress, lines=["1 shard is partial."])

    module("jobs.start", start_job=start_job, resume_job=start_job)
    module("jobs.append", append_job=start_job)
    module("jobs.retry", retry_job=start_job)
    return calls


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself_and_every_option(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert run([command, "--help"]) == 0
    text = capsys.readouterr().out
    assert f"bsq {command}" in text
    for line in text.splitlines():
        if re.match(r"│ \*? *--", line):
            assert re.search(r"[A-Za-z]{3,}.*\.", line.split("  ", 1)[1]), line


def test_help_names_every_command(capsys):
    assert run(["--help"]) == 0
    text = capsys.readouterr().out
    for command in COMMANDS:
        assert f" {command} " in text


def test_help_lists_commands_in_the_order_in_which_they_are_needed(capsys):
    run(["--help"])
    text = capsys.readouterr().out
    order = ["demo", "tokenize", "resume", "plan", "status", "inspect", "report", "verify", "export", "train", "submit"]
    places = [re.search(rf"^. {command} ", text, re.MULTILINE).start() for command in order]  # type: ignore[union-attr]
    assert places == sorted(places)


def test_help_of_a_spec_option_is_the_docstring_of_its_field(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    run(["tokenize", "--help"])
    assert "Resampling filter, always antialiased. Left out: lanczos." in capsys.readouterr().out


def test_the_version_is_printed(capsys):
    assert run(["--version"]) == 0
    assert re.fullmatch(r"bsqtok \d+\.\d+\.\d+\n", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["tokenise"], "No such command 'tokenise'. Did you mean 'tokenize'?"),
        (["tokenize", "--batsh", "3"], "--batch"),
        (["resume", "out", "--no-rays"], "--no-ray"),
        (["status"], "Missing argument"),
        (["tokenize", "a.tar", "--out", "o", "--batch", "many"], "Invalid value for '--batch': it must be"),
        (["tokenize", "a.tar", "--out", "o", "--crop", "centre"], "'--crop': 'centre' is not one of 'center'"),
        (["reconstruct", "out"], "--key"),
        (["retry"], "Missing argument"),
        (["retry", "out", "--sample"], "--samples"),
    ],
)
def test_wrong_usage_names_the_nearest_and_ends_with_2(arguments, says, capsys):
    assert run(arguments) == 2
    captured = capsys.readouterr()
    assert says in captured.err
    assert "Traceback" not in captured.err
    assert captured.out == ""


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["a.tar"], "SpecError: No output is named. Add --out DIR, a folder or URL for the dataset."),
        (["--out", "o"], "SpecError: No shards are named."),
        (["a.tar", "--out", "o", "--fps", "-1"], "SpecError: --fps must be greater than 0"),
        (["a.tar", "--out", "o", "--size", "huge"], "SpecError: --size must be"),
        (
            ["a.tar", "--out", "o", "--set", "preproces.size=3"],
            "SpecError: --set: unknown key 'preproces'. Did you mean",
        ),
        (
            ["a.tar", "--out", "o", "--set", "preprocess.size=["],
            "SpecError: --set preprocess.size: the value is not valid",
        ),
        (["a.tar", "--out", "o", "--set", "out.deep=1"], "SpecError: --set: out"),
        (["a.tar", "--out", "o", "--set", "nothing"], "SpecError: --set takes KEY=VALUE"),
        (["a.tar", "--out", "o", "--config", "none.yaml"], "SpecError: none.yaml: cannot be read"),
        (
            ["a.tar", "--out", "o", "--no-ray", "--ray-address", "auto"],
            "SpecError: --ray-address cannot go with --no-ray",
        ),
    ],
)
def test_a_wrong_spec_is_one_line_and_ends_with_2(arguments, line, capsys):
    assert run(["tokenize", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(line)
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_options_win_over_settings_and_these_over_the_job_file(tmp_path):
    config = tmp_path / "job.yaml"
    config.write_text(
        "shards: [from-file.tar]\nout: from-file\ntokenizer: from-file\n"
        "preprocess: {size: 64, filter: bicubic, seed: 1}\nrun: {batch: 8}\n"
    )
    spec = make_spec(
        shards=(),
        config=config,
        settings=["preprocess.size=96", "preprocess.filter=bilinear", "carry=[caption]", "clips.fps=source"],
        options={"size": "128", "out": "from-option", "workers": 2},
    )
    assert spec.shards == ("from-file.tar",)
    assert (spec.out, spec.tokenizer, spec.carry) == ("from-option", "from-file", ("caption",))
    assert (spec.preprocess.size, spec.preprocess.filter, spec.preprocess.seed) == (128, "bilinear", 1)
    assert (spec.run.batch, spec.run.workers, spec.clips.fps) == (8, 2, "source")
    assert make_spec(shards=["a.tar"], config=config, settings=(), options={}).shards == ("a.tar",)


def test_an_error_in_the_job_file_names_the_file(tmp_path):
    config = tmp_path / "job.yaml"
    config.write_text("shards: [a.tar]\nout: o\npreproces: {}\n")
    with pytest.raises(SpecError, match=r"job.yaml: unknown key 'preproces'. Did you mean 'preprocess'\?"):
        make_spec(shards=(), config=config, settings=(), options={})


def test_storage_settings_keep_secrets_whole():
    pairs = ["key=0123", "secret=1e5", "anon=true", "client_kwargs.endpoint_url=http://h:1", "config={a: 1}"]
    assert storage_options(pairs) == {
        "key": "0123",
        "secret": "1e5",
        "anon": True,
        "client_kwargs": {"endpoint_url": "http://h:1"},
        "config": {"a": 1},
    }
    assert storage_options([]) is None
    with pytest.raises(SpecError) as caught:
        storage_options(["hunter2"])
    assert "hunter2" not in str(caught.value)


def test_each_runner_has_its_option():
    def pick(no_ray=False, in_process=False):
        return runner_name(no_ray=no_ray, in_process=in_process, ray_address=None)

    assert (pick(), pick(no_ray=True), pick(in_process=True), pick(True, True)) == (
        "ray",
        "local",
        "in-process",
        "in-process",
    )


def test_tokenize_hands_its_options_to_the_driver_and_prints_what_came_out(driver, capsys):
    arguments = [
        "a.tar",
        "b.tar",
        "--out",
        "o",
        "--no-ray",
        "--batch",
        "4",
        "--storage-option",
        "anon=true",
    ]
    assert run(["tokenize", *arguments]) == 3
    ((spec,), settings) = driver[0]
    assert (spec.shards, spec.out, spec.run.batch) == (("a.tar", "b.tar"), "o", 4)
    assert settings == {
        "runner": "local",
        "ray_address": None,
        "force": False,
        "storage_options": {"anon": True},
    }
    captured = capsys.readouterr()
    assert captured.out.startswith("shards   2 of 2 committed\nsamples  7\n")
    assert captured.out.endswith("1 shard is partial.\n")
    assert "shard 1 is partial" in captured.err


def test_append_hands_on_only_the_settings_that_are_given(driver):
    """What is not given is the dataset's own, so it must be known what was."""
    assert run(["tokenize", "c.tar", "--out", "o", "--append", "--in-process", "--fps", "4"]) == 3
    ((spec,), settings) = driver[0]
    assert spec.model_dump(exclude_unset=True) == {"shards": ("c.tar",), "out": "o", "clips": {"fps": 4.0}}
    assert (settings["runner"], settings["force"]) == ("in-process", False)


@pytest.mark.parametrize(
    ("switches", "kind"), [([], "retry"), (["--samples"], "retry-samples"), (["--damaged"], "retry-damaged")]
)
def test_retry_hands_its_options_to_the_driver(driver, switches, kind):
    assert run(["retry", "o", "u.tar?sig=1", *switches, "--set", "limits.min_side=4", "--batch", "2", "--no-ray"]) == 3
    (arguments, settings) = driver[0]
    assert arguments == ("o", kind)
    assert settings.pop("asked").model_dump(exclude_unset=True) == {
        "shards": ("u.tar?sig=1",),
        "limits": {"min_side": 4},
        "run": {"batch": 2},
    }
    assert settings == {"runner": "local", "ray_address": None, "force": False, "storage_options": None}


def test_two_kinds_of_retry_are_two_commands(capsys):
    assert run(["retry", "o", "--samples", "--damaged"]) == 2
    assert capsys.readouterr().err.startswith("SpecError: --samples and --damaged cannot go together")


def test_resume_hands_its_options_to_the_driver(driver):
    assert run(["resume", "o", "--force", "--workers", "2", "--ray-address", "auto"]) == 3
    assert driver == [
        (
            ("o",),
            {
                "runner": "ray",
                "ray_address": "auto",
                "force": True,
                "workers": 2,
                "batch": None,
                "storage_options": None,
            },
        )
    ]


def test_status_prints_text_for_people_and_json_for_programs(module, capsys):
    status = SimpleNamespace(describe=lambda: "half done", to_json=lambda: json.dumps({"committed": 1}))
    module("jobs.progress", read_status=lambda out, storage_options=None: status)
    assert run(["status", "o"]) == 0
    assert capsys.readouterr().out == "half done\n"
    assert run(["status", "o", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"committed": 1}


@pytest.mark.parametrize(("ok", "code"), [(True, 0), (False, 3)])
def test_verify_ends_with_3_when_something_is_wrong(ok, code, module, capsys):
    module(
        "jobs.verify",
        verify_dataset=lambda out, **settings: SimpleNamespace(ok=ok, problems=[], describe=lambda: "checked"),
    )
    assert run(["verify", "o"]) == code
    assert capsys.readouterr().out == "checked\n"


def test_an_error_of_ours_is_its_kind_its_message_and_its_exit_code(module, capsys):
    def refuse(*arguments, **settings):
        raise LeaseHeld("o: another driver holds it.\nWait for it, or use --force.")

    module("jobs.progress", read_status=refuse)
    assert run(["status", "o"]) == 4
    assert capsys.readouterr().err == "LeaseHeld: o: another driver holds it.\nWait for it, or use --force.\n"


def test_an_unexpected_error_leaves_its_traceback_in_a_file(module, capsys, monkeypatch, tmp_path):
    def fail(*arguments, **settings):
        raise ZeroDivisionError("a very odd thing\nsecond line")

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    module("jobs.progress", read_status=fail)
    assert run(["status", "o"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("Unexpected ZeroDivisionError: a very odd thing\n")
    assert "Traceback" not in captured.err
    (log,) = tmp_path.iterdir()
    assert str(log) in captured.err
    assert "Traceback" in log.read_text()
    assert "second line" in log.read_text()


def test_an_interrupt_ends_with_130(module, capsys):
    def interrupt(*arguments, **settings):
        raise KeyboardInterrupt

    module("jobs.progress", read_status=interrupt)
    assert run(["status", "o"]) == 130
    assert capsys.readouterr().err == "Interrupted.\n"


def test_a_reader_that_stops_reading_causes_no_noise():
    code = (
        "import sys, types, jobs.entry\n"
        "fake = types.ModuleType('jobs.inspect'); fake.describe = lambda url, **settings: 'line\\n' * 100_000\n"
        "sys.modules['jobs.inspect'] = fake\n"
        "sys.argv = ['bsq', 'inspect', 'x']; jobs.entry.main()"
    )
    # Unbuffered, Python drops what does not fit the pipe and never notices that the reader is gone.
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=env
    )
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline() == "line\n"
    process.stdout.close()
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait(timeout=30) == 1


def test_a_signal_while_a_command_runs_leaves_no_traceback(tmp_path):
    # A shell that starts the tests in the background has them ignore SIGINT, and children inherit that.
    code = (
        "import signal, sys, time, types, jobs.entry\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "def wait(out, **settings): print('ready', flush=True); time.sleep(60)\n"
        "fake = types.ModuleType('jobs.progress'); fake.read_status = wait\n"
        "sys.modules['jobs.progress'] = fake\n"
        "sys.argv = ['bsq', 'status', 'x']; jobs.entry.main()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    os.kill(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert err == "Interrupted.\n"
    assert process.returncode == 130


def test_a_signal_while_modules_are_loaded_leaves_no_traceback():
    code = (
        "import sys\n"
        "class Interrupt:\n"
        "    def find_spec(self, name, *rest):\n"
        "        if name == 'pydantic': raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Interrupt())\n"
        "from jobs.entry import main\n"
        "sys.argv = ['bsq', 'status', 'x']; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "Interrupted.\n")


def test_the_installed_script_is_this_command_line():
    scripts = Path(sys.executable).parent / "bsq"
    if not scripts.exists():
        pytest.skip("bsqtok is not installed here")
    done = subprocess.run([scripts, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("bsqtok ")
