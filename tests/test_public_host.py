"""What a public host reads: workflows, issue forms, and the hooks before a commit."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
HOST = ROOT / ".github"
WORKFLOWS = sorted((HOST / "workflows").glob("*.yml"))
FORMS = sorted(set((HOST / "ISSUE_TEMPLATE").glob("*.yml")) - {HOST / "ISSUE_TEMPLATE/config.yml"})


def steps(path: Path) -> list[dict]:
    """All steps of a workflow's jobs."""
    jobs = yaml.safe_load(path.read_text())["jobs"].values()
    return [step for job in jobs for step in job["steps"]]


def targets(makefile: str) -> set[str]:
    """The targets that a Makefile declares phony.

    >>> sorted(targets(".PHONY: test lint"))
    ['lint', 'test']
    """
    return {name for line in re.findall(r"(?m)^\.PHONY: (.*)$", makefile) for name in line.split()}


def test_commands_of_workflows_are_targets_of_the_makefile():
    known = targets((ROOT / "Makefile").read_text())
    asked = {
        name
        for path in WORKFLOWS
        for step in steps(path)
        for name in re.findall(r"\bmake ([\w-]+)", step.get("run", ""))
    }
    assert {"test", "test-notebooks", "test-wheel", "dist"} <= asked <= known, asked - known


def test_actions_are_pinned_by_version_and_rights_are_few():
    for path in WORKFLOWS:
        uses = [step["uses"] for step in steps(path) if "uses" in step]
        assert all(re.fullmatch(r"[\w-]+/[\w-]+@(v\d+|release/v\d+)", one) for one in uses), uses
        assert yaml.safe_load(path.read_text())["permissions"] == {"contents": "read"}


def test_the_wheel_is_tried_with_the_oldest_and_the_newest_libraries():
    (path,) = [path for path in WORKFLOWS if path.stem == "checks"]
    matrix = yaml.safe_load(path.read_text())["jobs"]["wheel"]["strategy"]["matrix"]["include"]
    oldest, newest = matrix
    assert (oldest["libraries"], newest["libraries"]) == ("oldest", "newest")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["requires-python"] == f">={oldest['python']}"
    bare = [one for one in project["dependencies"] if not re.search(r">=\d", one)]
    assert not bare, f"{bare}: a lower bound is needed to try the oldest"


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_forms_ask_for_the_runs_files(path):
    fields = {part["id"]: part for part in yaml.safe_load(path.read_text())["body"] if "id" in part}
    for name, label in (("config", "config.yaml"), ("summary", "summary.json")):
        assert fields[name]["attributes"]["label"] == label
        required = fields[name].get("validations", {}).get("required", False)
        assert required or path.stem == "wish", f"{label} is not required"


@pytest.mark.parametrize(
    ("schema", "files"),
    [
        ("vendor.github-workflows", WORKFLOWS),
        ("vendor.github-issue-forms", FORMS),
        ("vendor.github-issue-config", [HOST / "ISSUE_TEMPLATE" / "config.yml"]),
        ("vendor.citation-file-format", [ROOT / "CITATION.cff"]),
    ],
)
def test_files_are_of_the_hosts_form(schema, files):
    pytest.importorskip("check_jsonschema")
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", schema]
    done = subprocess.run([*command, *map(str, files)], capture_output=True, text=True)
    assert files and done.returncode == 0, done.stdout + done.stderr


def test_hooks_run_what_make_test_runs():
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    hooks = {hook["id"]: hook for repo in config["repos"] for hook in repo["hooks"]}
    wanted = {"ruff", "ruff-format", "basedpyright", "notebooks", "check-added-large-files"}
    assert wanted <= set(hooks)
    for entry in (hook["entry"] for hook in hooks.values() if "entry" in hook):
        for name in re.findall(r"tests/\w+\.py", entry):
            assert (ROOT / name).is_file()
