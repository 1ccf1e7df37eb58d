"""The report on a learning rate: every question asked of one run, on one page."""

import dataclasses
import functools
import html
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import optax
from tqdm import tqdm

from eomdl import _check, _tree
from eomdl._types import Args, Loss, Params
from eomdl.plotting._inline import page_colours, svg
from eomdl.reports import page
from eomdl.reports.finding import Finding, NoAnswer, number
from eomdl.reports.questions import discreteness, distance, edge, models, rates, shape, symmetries
from eomdl.reports.study import FULL, QUICK, Optimizer, Study, make_study


@dataclasses.dataclass(frozen=True)
class Question:
    """A question in words, and what answers it. `name`: of its section and of its finding."""

    name: str
    title: str
    ask: Callable[[Study], Finding]


QUESTIONS = tuple(
    Question(name, module.TITLE, module.ask)
    for name, module in {
        "edge": edge,
        "distance": distance,
        "rates": rates,
        "discreteness": discreteness,
        "models": models,
        "symmetries": symmetries,
        "path": shape,
    }.items()
)


@dataclasses.dataclass(frozen=True)
class Report:
    """What the learning rate does to a run: a finding for every question, as `eomdl.report` describes it."""

    findings: Mapping[str, Finding]
    summary: tuple[str, ...]
    setting: Mapping[str, str]

    @property
    def data(self) -> dict[str, Mapping[str, Any]]:
        """The numbers of every finding, as they were computed."""
        return {name: finding.data for name, finding in self.findings.items()}

    @functools.cached_property
    def html(self) -> str:
        """The page, one self-contained file of HTML."""
        summary = "".join(f"<li>{html.escape(sentence)}</li>" for sentence in self.summary)
        setting = "".join(_row(what, value) for what, value in self.setting.items())
        links = "".join(
            f"<li><a href='#{q.name}'>{html.escape(q.title)}</a></li>"
            for q in QUESTIONS
            if q.name in self.findings
        )
        body = [
            "<header><h1>What the learning rate does</h1>",
            f"<ul class='lead'>{summary}</ul><dl>{setting}</dl></header>",
            f"<nav aria-label='Contents'><h2>Questions</h2><ol>{links}</ol></nav>",
            *(_section(q, self.findings[q.name]) for q in QUESTIONS if q.name in self.findings),
        ]
        return page.document("eomdl: what the learning rate does", "".join(body))

    def text(self) -> str:
        """Return the report without pictures."""
        parts = ["What the learning rate does", *(f"- {sentence}" for sentence in self.summary), ""]
        for question in QUESTIONS:
            if question.name in self.findings:
                parts += [question.title, self.findings[question.name].text()]
        return "\n".join(parts)

    def _repr_html_(self) -> str:
        """Return what a notebook shows: the page in a frame, whose style does not reach the notebook."""
        return f"<iframe srcdoc='{html.escape(self.html)}' style='width: 100%; height: 40em; border: 0'></iframe>"

    def save(self, path: str | Path) -> None:
        """Write the page. **Raises:** `ValueError` if `path` is none."""
        _check.path("path", path).write_text(self.html, encoding="utf-8")


def report(
    loss: Loss,
    params: Params,
    learning_rate: float,
    num_steps: int,
    *,
    optimizer: Optimizer = optax.sgd,
    args: Args = None,
    batches: Any = None,
    quick: bool = False,
    progress: bool = False,
) -> Report:
    r"""Tell what a learning rate does to a training run, in plain words with the numbers beside them.

    ```python
    report = eomdl.report(loss, params, 0.1, 500, args=data)
    print(report.text())
    report.save("report.html")
    ```

    It trains, integrates the flows that may describe the run, and answers: is $\eta \lambda$ at the optimizer's edge of
    stability, and since when; how far is gradient flow, predicted and measured; up to which rate is it a fair picture; what
    do finite steps add ($\eta |\xi_0| / |g|$); which flow describes the run, at what cost; which symmetries the loss
    has and how their charges drift; what the path looks like. What cannot be answered says why, and the rest is answered.

    **Arguments:**

    - `loss`, `params`, `num_steps`, `args`, `batches`: as in `eomdl.descend`. Of more batches than steps the first ones are taken.
        With `batches`, `args` is the whole data, for the questions that need it.
    - `learning_rate`: $\eta$, a finite number > 0.
    - `optimizer`: a function `learning_rate -> optax.GradientTransformation`, such as `optax.sgd` or `optax.adam`; or a
        transformation, whose own learning rate must be the one given.
    - `quick`: measure fewer points, and not the ODE solver's own error.
    - `progress`: one line for each question, on stderr.

    **Returns:** the report, with

    - `save(path)`, which writes the page, one file of HTML; `text()`, the same without pictures;
    - `findings`: `{question: finding}` with `answer`, `meaning`, `numbers`, `notes` and `data`; the questions are "edge",
        "distance", "rates", "discreteness", "models", "symmetries" and "path";
    - `summary`, a few sentences; `setting`, what the report is about; `data`, the numbers of every finding.

    A run that becomes non-finite is reported up to there.

    **Cost** in gradients, gradient descent at $\eta\lambda$ about 0.5: for each step 1 for the run and 30 for its flows (quick: 17),
    less on a smooth path; 43 for each of up to 60 (quick: 16) measurements of the sharpness (an optimizer that rescales its
    steps: 10 more, and its run once more). On a small problem compiling takes most of the time.

    **Raises:** `ValueError` for a wrong argument, and for an optimizer that has another learning rate; `ModuleNotFoundError`
    without matplotlib, which comes with `eomdl[plot]`.

    Source: Miyagawa 2022 (arXiv 2210.15898); Cohen et al. 2021 (arXiv 2103.00065) for the edge of stability.
    """
    page_colours()  # without matplotlib there is no page: raised before the work, not after it
    quick, progress = _check.flag("quick", quick), _check.flag("progress", progress)
    study = make_study(
        loss, params, learning_rate, num_steps, optimizer, args, batches, QUICK if quick else FULL
    )
    rule = study.rule
    start = time.perf_counter()
    findings = {}
    bar = tqdm(
        QUESTIONS,
        file=sys.stderr,
        disable=None if progress else True,
        leave=False,
        bar_format="{n_fmt}/{total_fmt} {desc}",
    )
    for question in bar:
        bar.set_description_str(f"{question.title} ({time.perf_counter() - start:.0f} s)")
        findings[question.name] = _ask(question, study)
        if progress:
            bar.write(f"{question.title} {findings[question.name].answer}", file=sys.stderr)
    setting = {
        "optimizer": "not gradient descent (its updates are rescaled, or change with time)"
        if rule is None
        else rule.name,
        "learning rate": number(study.learning_rate),
        "steps": f"{study.num_steps}",
        "parameters": f"{study.size:,}",
        "data of a step": "all" if batches is None else "a minibatch",
        "precision": str(_tree.dtype(study.params)),
        "size of this report": "quick" if quick else "full",
        "made in": f"{time.perf_counter() - start:.0f} s, {jax.devices()[0].platform}",
    }
    return Report(findings, _summary(findings), setting)


def _summary(findings: Mapping[str, Finding]) -> tuple[str, ...]:
    """Return a sentence for each question that has one, and which have no answer."""
    unanswered = [q.title for q in QUESTIONS if not findings[q.name].answered]
    sentences = [finding.summary for finding in findings.values() if finding.summary]
    if unanswered:
        sentences.append(f"Not answered, with the reason in its section: {' '.join(unanswered)}")
    return tuple(sentences)


def _ask(question: Question, study: Study) -> Finding:
    """Return the finding, or the reason why there is none in its place; warnings become notes."""
    with warnings.catch_warnings(record=True) as caught, page_colours():
        warnings.simplefilter("always")
        try:
            finding = question.ask(study)
        except NoAnswer as reason:
            finding = Finding(answer=f"Not answered. {reason}", answered=False)
        except Exception as error:  # one question's failure is not the others'
            first_line = f"{type(error).__name__}: {error}".splitlines()[0]
            finding = Finding(answer=f"Not answered. {first_line}", answered=False)
    ours = [str(w.message) for w in caught if w.category is UserWarning and "eomdl" in w.filename]
    known = {*finding.notes}
    new = [text for text in dict.fromkeys(ours) if not any(note.endswith(text) for note in known)]
    return dataclasses.replace(finding, notes=(*finding.notes, *new))


def _section(question: Question, finding: Finding) -> str:
    """Return the HTML of a question with its answer, numbers, pictures and tables."""
    with page_colours():
        drawn = {name: svg(figure, f"{question.name}-{name}") for name, figure in finding.pictures.items()}
    pictures = "".join(f"<figure>{picture}</figure>" for picture in drawn.values())
    numbers = "".join(_row(what, value) for what, value in finding.numbers.items())
    notes = "".join(f"<li>{html.escape(note)}</li>" for note in finding.notes)
    tables = "".join(page.table(name, table) for name, table in finding.tables.items())
    kind = "answer" if finding.answered else "answer na"
    return (
        f"<section id='{question.name}'><h2>{html.escape(question.title)}</h2>"
        f"<p class='{kind}'>{html.escape(finding.answer)}</p>"
        + (f"<dl>{numbers}</dl>" if numbers else "")
        + (f"<div class='pictures'>{pictures}</div>" if pictures else "")
        + tables
        + (f"<p class='small'>{html.escape(finding.meaning)}</p>" if finding.meaning else "")
        + (f"<h3>Caveats</h3><ul class='small'>{notes}</ul>" if notes else "")
        + "</section>"
    )


def _row(what: str, value: str) -> str:
    return f"<div><dt>{html.escape(what)}</dt><dd>{html.escape(value)}</dd></div>"
