"""Workflows, hooks, issue forms, the image and the release procedure say what the rest of the repository says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from support import release

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
FORMS = [path for path in sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")) if path.name != "config.yml"]
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def load(path: Path) -> dict[str, Any]:
    loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert isinstance(loaded, dict), path
    return loaded


def commands(workflow: Path) -> list[str]:
    return [step["run"] for job in load(workflow)["jobs"].values() for step in job["steps"] if "run" in step]


def test_ci_runs_what_ci_runs_here() -> None:
    """`.ci/run` is the one list of what is tested; the workflow calls it and adds what it leaves out."""
    run = commands(ROOT / ".github" / "workflows" / "ci.yml")
    assert "bash .ci/run" in run
    assert (ROOT / ".ci" / "run").exists()
    assert any(command.startswith("make lint") for command in run)


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_make_targets_of_workflows_exist(workflow: Path) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"^make ([\w-]+)", "\n".join(commands(workflow)), re.M)
    assert targets
    assert [target for target in targets if not re.search(rf"^{target}:", makefile, re.M)] == []


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_end_and_may_write_nothing(workflow: Path) -> None:
    """A time for each job that runs commands of ours; no right to write to the repository."""
    loaded = load(workflow)
    assert loaded["permissions"] == {"contents": "read"}
    for name, job in loaded["jobs"].items():
        assert "write" not in str(job.get("permissions", {}).get("contents"))
        assert "timeout-minutes" in job or not any("run" in step for step in job["steps"]), name


def test_the_wheel_is_tried_on_every_python_that_is_promised() -> None:
    tried = load(ROOT / ".github" / "workflows" / "ci.yml")["jobs"]["wheel"]["strategy"]["matrix"]["python"]
    promised = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', PYPROJECT)
    assert tried == promised == [f"3.{minor}" for minor in range(10, 15)]
    assert f'requires-python = ">={promised[0]}"' in PYPROJECT


@pytest.mark.parametrize("form", FORMS, ids=lambda path: path.stem)
def test_issue_forms_ask_for_something_and_name_each_field_once(form: Path) -> None:
    loaded = load(form)
    assert loaded["name"] and loaded["description"]
    fields = [field for field in loaded["body"] if field["type"] != "markdown"]
    assert len({field["id"] for field in fields}) == len(fields) > 0
    assert all(field["attributes"]["label"] for field in fields)
    assert any(field.get("validations", {}).get("required") for field in fields)


def test_hooks_before_a_commit_use_the_tools_of_the_environment() -> None:
    """So there is one version of each tool, that of constraints.txt."""
    (repo,) = load(ROOT / ".pre-commit-config.yaml")["repos"]
    assert repo["repo"] == "local"
    for hook in repo["hooks"]:
        assert hook["entry"].startswith(".venv/bin/")
        for path in re.findall(r"tests/[\w/]+\.py", hook["entry"]):
            assert (ROOT / path).exists(), path


def test_the_image_has_all_that_it_copies_and_extras_that_exist() -> None:
    dockerfile = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    sent = {line[1:] for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines() if line[0] == "!"}
    copied = {name for line in re.findall(r"^COPY (?!--from)(.+) \S+$", dockerfile, re.M) for name in line.split()}
    assert copied == sent and all((ROOT / name).exists() for name in copied)
    (extras,) = re.findall(r'"\$1\[([\w,]+)\]"', dockerfile)
    assert all(re.search(rf"^{extra} = \[", PYPROJECT, re.M) for extra in extras.split(","))


def test_the_page_on_installing_names_every_extra_of_users() -> None:
    page = (ROOT / "docs" / "install.md").read_text(encoding="utf-8")
    there = set(
        re.findall(r"^([\w-]+) = \[", PYPROJECT.split("[project.optional-dependencies]")[1].split("\n[")[0], re.M)
    )
    ours = {"demo", "docs", "test", "dev"}  # of a clone, installed by make
    assert ours < there
    assert set(re.findall(r"^\| `([\w-]+)` \|", page, re.M)) == there - ours


def test_version_changelog_and_citation_agree() -> None:
    assert release.problems(ROOT) == []


TREE = {
    "pyproject.toml": 'version = "1.2.0"\n',
    "src/diglot/__init__.py": '__version__ = "1.2.0"\n',
    "CITATION.cff": "version: 1.2.0\n",
    "CHANGELOG.md": "# Changelog\n\n## 1.2.0 (2030-01-31)\n\n- New.\n\n## 1.1.0 (2029-01-31)\n\n- Old.\n",
}


@pytest.mark.parametrize(
    ("file", "before", "after", "problem"),
    [
        ("CHANGELOG.md", "", "", None),
        ("CHANGELOG.md", "## 1.2.0", "## 1.1.5", "the newest entry of CHANGELOG.md is 1.1.5"),
        ("CHANGELOG.md", "- New.", "", "the entry of 1.2.0 in CHANGELOG.md is empty"),
        ("CHANGELOG.md", "(2030-01-31)", "(unreleased)", "has (unreleased) behind the version"),
        ("CITATION.cff", "1.2.0", "1.1.0", "CITATION.cff says version 1.1.0"),
        ("src/diglot/__init__.py", "1.2.0", "1.1.0", "src/diglot/__init__.py says version 1.1.0"),
        ("pyproject.toml", "1.2.0", "1.3.0", "the tag must be v1.3.0"),
    ],
)
def test_a_release_is_refused_until_all_agree(
    file: str, before: str, after: str, problem: str | None, tmp_path: Path
) -> None:
    for name, text in TREE.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text.replace(before, after) if name == file else text, encoding="utf-8")
    result = release.problems(tmp_path, "v1.2.0")
    assert any(problem in one for one in result) if problem else result == []


def test_the_index_for_language_models_names_every_page_and_no_other() -> None:
    linked = set(re.findall(r"^- \[.+?\]\((.+?)\)", (ROOT / "llms.txt").read_text(encoding="utf-8"), re.M))
    pages = {f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")}
    assert linked == pages | {"README.md", "CONTRIBUTING.md", "CHANGELOG.md"}
