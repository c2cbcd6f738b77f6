"""What ``tune`` returns: fidelity before and after, the curve, a report, and the card of the saved model."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from anypatch.errors import AnypatchError
from anypatch.files.atomic import replacing_file
from anypatch.files.paths import place
from anypatch.report.measurements import Sample
from anypatch.report.svg import Point, curve
from anypatch.report.templating import picture_data, render
from anypatch.tuning.checkpoint import RESULT, Curve

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

Row = dict[str, Any]
TITLES = {
    "patch_size": "patch size",
    "image_size": "image size",
    "tokens": "tokens",
    "fidelity_before": "fidelity, before",
    "fidelity_after": "fidelity, after",
    "patch_fidelity_before": "patch fidelity, before",
    "patch_fidelity_after": "patch fidelity, after",
}
LABELLED = {"accuracy_before": "accuracy, before", "accuracy_after": "accuracy, after"}  # where there are class folders
PHOTO = 320  # pixels of a photograph's longer side in the report


@dataclass(repr=False)
class TuneResult:
    """What tuning did.

    >>> import timm
    >>> from anypatch import tune
    >>> model = timm.create_model("test_vit", img_size=64)
    >>> result = tune(model, images="photos", patch_size=(16, 32), steps=1, learning_rate=1e-5, num_workers=0)
    >>> result.to_pandas()[["patch_size", "tokens"]].values.tolist()
    [['16x16', 16], ['32x32', 4]]
    >>> sorted(path.name for path in result.save("tuned").iterdir())
    ['report.html', 'tune.csv', 'tune.json']

    Attributes:
        model: the tuned model, the one that was given; with one patch size adapted to it, with several at its native
            geometry.
        rows: one per patch size: the mean cosine to the native model's features on held-out images, of the pooled
            feature (``fidelity``) and of the patch map (``patch_fidelity``), before and after; where the images lie in
            class folders, the accuracy of the nearest neighbours' class on held-out images as well.
        curve: pairs of a step and the held-out fidelity by patch size.
        settings: how it was made.
        notes: what the user should know: skipped images, nothing gained.
        samples: held-out images for the report, with their patch features natively, before and after, as colours.
    """

    model: nn.Module
    rows: list[Row]
    curve: Curve = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)

    def __str__(self) -> str:
        return self.says

    def __repr__(self) -> str:
        sizes = ", ".join(row["patch_size"] for row in self.rows)
        kept = "" if self.gained else ", nothing gained"
        return f"TuneResult({type(self.model).__name__}, patch {sizes}{kept})"

    def _repr_html_(self) -> str:
        """The sentence and the table, in a notebook."""
        return str(render("tuning_notebook.html", **self._table(), says=self.says, notes=self.notes))

    def _table(self) -> dict[str, Any]:
        rows = [[_shown(row[name]) for name in self.titles] for row in self.rows]
        return {"names": list(self.titles.values()), "rows": rows}

    @property
    def titles(self) -> dict[str, str]:
        """The columns of the rows, and how they are headed."""
        return {**TITLES, **(LABELLED if any("accuracy_after" in row for row in self.rows) else {})}

    @property
    def gained(self) -> bool:
        """Whether any weights were changed."""
        return bool(self.settings.get("share"))

    def to_pandas(self) -> DataFrame:
        """The rows as a table."""
        try:
            import pandas
        except ImportError as error:
            raise AnypatchError("this needs pandas: pip install 'anypatch[sweep]'") from error
        return pandas.DataFrame(self.rows)

    def to_dict(self) -> dict[str, Any]:
        """What ``tune.json`` holds."""
        return {"rows": self.rows, "curve": self.curve, "settings": self.settings, "notes": self.notes}

    def to_csv(self) -> str:
        """What ``tune.csv`` holds."""
        text = io.StringIO()
        writer = csv.DictWriter(text, list(self.titles), lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        return text.getvalue()

    def plot(self) -> Figure:
        """Held-out fidelity over the steps, one line per patch size, as a matplotlib figure."""
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise AnypatchError("this needs matplotlib: pip install 'anypatch[sweep]'") from error
        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.subplots()
        for patch in dict.fromkeys(name for _, looked in self.curve for name in looked):
            axes.plot([s for s, _ in self.curve], [looked[patch] for _, looked in self.curve], label=f"patch {patch}")
        axes.set_xlabel("steps")
        axes.set_ylabel("held-out fidelity")
        axes.legend()
        return figure

    def to_html(self, path: str | Path) -> Path:
        """Write the report: one file that opens without a network."""
        target = place(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        points = [
            Point(step, sum(looked.values()) / len(looked), str(step), f"step {step}", front=True)
            for step, looked in self.curve
            if step
        ]
        page = render(
            "tuning.html",
            **self._table(),
            samples=[self._pictures(sample) for sample in self.samples],
            chart=curve(points, "steps", "held-out fidelity", self.says) if points else "",
            says=self.says,
            settings={k: v for k, v in self.settings.items() if v is not None},
            notes=self.notes,
        )
        with replacing_file(target) as file:
            file.write(page.encode("utf-8", "replace"))
        return target

    def save(self, folder: str | Path) -> Path:
        """Write ``tune.json``, ``tune.csv`` and ``report.html`` into a folder."""
        target = place(folder)
        target.mkdir(parents=True, exist_ok=True)
        for name, text in ((RESULT, json.dumps(self.to_dict(), indent=2) + "\n"), ("tune.csv", self.to_csv())):
            with replacing_file(target / name) as file:
                file.write(text.encode())
        self.to_html(target / "report.html")
        return target

    def _pictures(self, sample: Sample) -> dict[str, Any]:
        """For the report's page: the photograph, the native map, and the maps before and after at each patch size."""
        heads = [f"patch {self.settings['native_patch_size']}, native"]
        heads += [f"patch {row['patch_size']}, {when}" for when in ("before", "after") for row in self.rows]
        return {
            "name": sample.name,
            "photo": picture_data(sample.image, PHOTO, photo=True),
            "maps": [(head, picture_data(colours)) for head, colours in zip(heads, sample.maps, strict=True)],
        }

    @property
    def says(self) -> str:
        """The result in a sentence."""
        if not self.gained:
            return "Nothing was gained on held-out images: the weights are the adapted model's."
        parts = [
            f"patch {row['patch_size']}: {row['fidelity_before']:.3f} to {row['fidelity_after']:.3f}, patch map "
            f"{row['patch_fidelity_before']:.3f} to {row['patch_fidelity_after']:.3f}"
            for row in self.rows
        ]
        return f"Cosine to the native model's features on held-out images: {'; '.join(parts)}."

    def card(self) -> str:
        """How the model was made, in Markdown, for the folder that it is saved in."""
        lines = ["# How these weights were made", "", self.says, "", "| " + " | ".join(self.titles.values()) + " |"]
        lines += ["|" + "---|" * len(self.titles)]
        lines += ["| " + " | ".join(_shown(row[name]) for name in self.titles) + " |" for row in self.rows]
        facts = [f"- {name.replace('_', ' ')}: {value}" for name, value in self.settings.items() if value is not None]
        how = (
            "Distilled without labels from the model itself at its native geometry: cosine of pooled features and "
            "patch maps, of tokens between blocks where they can be read, and the divergence of the logits where there "
            "is a classifier. Fidelity is measured on images that were held out of training; the best weights were "
            "chosen on them, none worse than the start in the pooled feature or the patch map of any patch size but "
            "the native one."
        )
        notes = ["", *(f"- {note}" for note in self.notes)] if self.notes else []
        return "\n".join([*lines, "", how, "", *facts, *notes, ""])


def _shown(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)
