"""The page about a run: what is on it, and that nothing in a run can become markup."""

from __future__ import annotations

import html.parser
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import support.tokenizers_zoo as zoo
from support import tiny
from support.made_runs import EVIL, WORDS, make_run

from diglot.cli.main import main
from diglot.errors import DataError
from diglot.report import colours
from diglot.report.page import _columns, page, visible
from diglot.report.plots import CURVES, drawn, svg
from diglot.report.runs import load_run
from diglot.report.verdict import judge


class Reader(html.parser.HTMLParser):
    """Elements, their attributes, and all text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> str:
    return page([load_run(make_run(tmp_path_factory.mktemp("runs") / "first"))])


def test_text_of_a_run_is_never_markup(one: str) -> None:
    """Prompts, completions, tokens, options and inspections that hold scripts are shown as text."""
    html = Reader(one)
    assert "script" not in html.tags and "img" not in html.tags
    assert not [name for name, _ in html.attributes if name.startswith("on")]
    assert html.text.count("<script>document.title='owned'</script>") >= 6
    assert EVIL not in one


def test_the_page_needs_nothing_from_elsewhere(one: str) -> None:
    """No address is loaded: the only ones are names of SVG's own vocabulary; and the policy forbids the rest."""
    html = Reader(one)
    assert not {"link", "iframe", "object", "embed", "audio", "video"} & set(html.tags)
    loading = [v for n, v in html.attributes if n in ("src", "href", "xlink:href", "srcset", "action", "data")]
    assert loading and all(value.startswith("#") for value in loading)
    assert "@import" not in one and not re.search(r"url\((?!#)", one)
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'") in html.attributes


def test_ids_are_unique_and_every_reference_has_its_target(one: str) -> None:
    html = Reader(one)
    ids = [value for name, value in html.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    used = [v[1:] for n, v in html.attributes if n in ("href", "xlink:href")] + re.findall(r"url\(#([^)]+)\)", one)
    assert used and set(used) <= set(ids)


def test_curves_numbers_warnings_gaps_pair_and_options_are_there(one: str) -> None:
    html = Reader(one)
    for title in ("Divergence student", "Reference text", "Length of completions", "Stop agreement", "Gradient norm"):
        assert title in html.text
    assert html.tags.count("svg") == 8
    assert "0.3" in html.text and "0.1" in html.text and "-0.2" in html.text
    assert "of the completions' text repeats" in html.text
    assert "before the first step" in html.text and "after step 40" in html.text
    assert "byte-level" in html.text and "learning_rate" in html.text
    spans = [v for n, v in html.attributes if n == "class" and v.startswith("chunk")]
    assert len(spans) == 4 * (len(WORDS) + 1) + 8 * 6  # both ends of two prompts; eight steps of training
    assert "chunk g5" in spans and "chunk m5" in spans and "chunk m5 stop" in spans and "chunk unknown" in spans


@pytest.mark.parametrize(("student", "teacher", "shown"), [
    ("org/student", "org/teacher", "org/student ← org/teacher"),
    ("HERE/student", "HERE/teacher/", "student ← teacher"),
    ("~/models/student", "../teacher", "student ← teacher"),
    ("org/student", [{"name": "HERE/a", "weight": 2}, "org/b"], "org/student ← a, org/b"),
    ("org/student", "http://10.0.0.3:8000", "org/student ← a teacher on a server"),
    ("org/student", [{"name": "http://10.0.0.3:8000", "tokenizer": "HERE/c"}, "self"], "org/student ← c, self"),
])  # fmt: skip
def test_models_are_named_without_their_folders_and_addresses(
    student: str, teacher: object, shown: str, tmp_path: Path
) -> None:
    folder = make_run(tmp_path / "r")
    options = {"model_name_or_path": student, "teacher_model_name_or_path": teacher, "trainer": "gkd"}
    text = json.dumps(options).replace("HERE", str(tmp_path))
    (folder / "resolved_config.yaml").write_text(text, encoding="utf-8")
    subtitle = re.search(r'<p class="sub">\s*(.*?), gkd, ', page([load_run(folder)]), re.S)
    assert subtitle and subtitle[1] == shown


def test_options_are_shown_without_folders_of_the_machine(tmp_path: Path) -> None:
    runs = []
    for name in ("one", "two"):
        folder = make_run(tmp_path / name)
        options = {
            "output_dir": str(tmp_path / name),
            "dataset_name": [{"name": str(tmp_path / "rows.jsonl")}, "org/b"],
        }
        (folder / "resolved_config.yaml").write_text(json.dumps(options), encoding="utf-8")
        runs.append(load_run(folder))
    text = page(runs)
    assert str(tmp_path) not in text and "rows.jsonl" in text and "org/b" in text
    assert '<th scope="row">output_dir</th><td class="left">one</td><td class="left">two</td>' in text


def test_two_runs_stand_side_by_side(tmp_path: Path) -> None:
    runs = [load_run(make_run(tmp_path / name, shift)) for name, shift in (("a <b>", 0.0), ("second", 0.05))]
    text = page(runs)
    html = Reader(text)
    assert "a <b>" in html.text and "a <b>" not in text
    assert re.search(r"learning_rate\s*0\.0\s*0\.05", html.text)
    titles = re.findall(r"<h3>(\S+)", text.replace("a &lt;b&gt;", "first"))
    assert titles[:4] == ["first", "second"] * 2


def test_a_run_without_its_other_files_is_shown_as_far_as_it_goes(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "r")
    for name in ("rollouts.jsonl", "resolved_config.yaml", "inspection.json"):
        (folder / name).unlink()
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n', encoding="utf-8")
    html = Reader(page([load_run(folder)]))
    assert html.tags.count("svg") == 1 and "No completions were kept" in html.text


def test_the_report_of_a_real_little_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From the trainer's own files through the command."""
    tiny.gkd(tmp_path / "run", zoo.chatml(), zoo.inst(), max_steps=2, log_rollouts=2, lmbda=1.0).train()
    assert main(["report", str(tmp_path / "run"), "--out", str(tmp_path / "out" / "r.html")]) == 0
    assert capsys.readouterr().out.strip().endswith("r.html")
    html = Reader((tmp_path / "out" / "r.html").read_text(encoding="utf-8"))
    assert "Say hello." in html.text and "after step 2" in html.text


def test_a_folder_that_is_no_run_is_an_error_that_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path)]) == 2
    assert "holds no metrics.jsonl" in capsys.readouterr().err
    (tmp_path / "metrics.jsonl").write_text('{"loss": 1}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"entry 1 of metrics\.jsonl has no step"):
        load_run(tmp_path)


def test_the_command_does_not_wait_for_torch(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "r")
    code = f"import sys; from diglot.cli.main import main; main(['report', {str(folder)!r}])"
    code += "; assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_text_can_be_read_on_every_colour() -> None:
    """WCAG 2 AA: a contrast of 4.5 at least, in both modes."""
    css = (Path(colours.__file__).parent / "templates" / "report.css").read_text(encoding="utf-8")
    inks = re.findall(r"--ink: (#\w{6})", css)
    scales = (colours.LIKES_LIGHT + colours.DISLIKES_LIGHT, colours.LIKES_DARK + colours.DISLIKES_DARK)
    for ink, scale in zip(inks, scales, strict=True):
        for colour in scale:
            low, high = sorted((luminance(ink), luminance(colour)))
            assert (high + 0.05) / (low + 0.05) >= 4.5, (ink, colour)


def test_the_scale_is_symmetric_and_ends() -> None:
    assert [colours.step_of(g) for g in (None, float("nan"), 0.0, 0.3, 0.5, 4.0, 99.0)] == [0, 0, 0, 0, 1, 5, 5]
    assert all(colours.step_of(-g) == -colours.step_of(g) for g in (0.3, 0.5, 1.7, 2.9, 50.0))


def test_white_space_and_control_characters_can_be_seen() -> None:
    assert visible(" a\n\t\x0e\u202e") == "·a⏎⇥\\x0e\\u202e"


def with_metrics(folder: Path, **after: float) -> Path:
    """A made run whose numbers after the last step are these, with a standard error of 0.01 on both sides."""
    make_run(folder)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    for line in lines:
        if "phase" in line:
            line["fixed/kl_error"] = 0.01
            line |= {f"fixed/{name}": value for name, value in after.items()} if line["phase"] == "after" else {}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("after", "answer"),
    [
        (0.1, "Yes, it worked. The distance to the teacher went from 0.300 to 0.100 nats per byte"),
        (0.31, "No clear change."),
        (0.5, "No, it got worse."),
    ],
)
def test_the_first_line_says_whether_it_worked_with_an_interval_then_where_then_what_next(
    tmp_path: Path, after: float, answer: str
) -> None:
    text = Reader(page([load_run(with_metrics(tmp_path / "run", kl_nats_per_byte=after))])).text
    places = [text.index(part) for part in (answer, "95% interval", "likes these least", "Next:", "What changed")]
    assert places == sorted(places)


def test_a_run_without_numbers_of_both_ends_is_not_called_a_success(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    (folder / "metrics.jsonl").write_text("\n".join(one for one in lines if '"after"' not in one), encoding="utf-8")
    assert judge(load_run(folder)).answer.startswith("Whether it worked cannot be said")


def test_a_change_whose_noise_is_unknown_is_not_called_certain_and_a_text_is_named_once(tmp_path: Path) -> None:
    result = judge(load_run(make_run(tmp_path / "run")))
    assert result.answer.startswith("Not certain") and "interval" not in result.answer
    places = re.findall("“(.*?)”", result.where)
    assert places and len(places) == len(set(places))


def test_axes_end_where_values_end(tmp_path: Path) -> None:
    """A share that reaches 1 has no label above it, and a distance that reaches 0 none below."""
    run = load_run(with_metrics(tmp_path / "run", coverage=1.0, kl_nats_per_byte=0.0))
    for curve in (one for one in CURVES if one.bounds[0] == 0 and not one.log_scale and drawn(one, [run])):
        labels = re.findall(r">([\N{MINUS SIGN}\d.]+)</text>", svg(curve, [run], "p"))
        numbers = [float(label.replace("\N{MINUS SIGN}", "-")) for label in labels]
        assert numbers and min(numbers) >= 0, curve.title
        if curve.bounds[1] == 1:  # the other labels are steps, which are 0 or more than 1
            assert not [n for n in numbers if 1 < n < 5], (curve.title, numbers)


def test_losses_of_two_objectives_have_an_axis_each(tmp_path: Path) -> None:
    runs = [load_run(make_run(tmp_path / name)) for name in ("a", "b")]
    assert Reader(page(runs)).tags.count("figure") == 8
    runs[1].config["objective"] = "alm"
    html = Reader(page(runs))
    assert html.tags.count("figure") == 10 and "Loss: a" in html.text and "Loss: b" in html.text


def test_options_without_a_value_are_not_listed_and_numbers_of_a_row_have_the_same_decimals(tmp_path: Path) -> None:
    run = load_run(with_metrics(tmp_path / "run", mean_bytes=118.25))
    run.config["lm_coef"] = None
    made = page([run])
    text = Reader(made).text
    assert "lm_coef" not in text and "None" not in text
    cells = re.findall(r"<td>\s*(\S+?)\s*</td>", made[made.index("Length of completions") :])
    assert cells[:3] == ["120", "118", "\N{MINUS SIGN}2"]


@pytest.mark.parametrize("number", range(2, 12))
def test_no_picture_is_alone_in_the_last_line(number: int) -> None:
    assert number % _columns(number) != 1
