"""The charts of a page as Vega-Lite specifications, made with Altair.

They have no data: the page's script puts rows below the names of the data sets, and values in place
of strings that begin with `@` (`@*` where a list is wanted). Colours are told apart by the
colour-blind (Okabe and Ito; viridis), and everything that a colour says is said by a dash, a shape
or a number too, so that a page printed in grey loses nothing.
"""

from typing import Any

from fedjax_sec.core.optional import require
from fedjax_sec.report.plotting import COLOURS

DASHES = ((1, 0), (7, 3), (2, 2), (9, 3, 2, 3), (14, 4), (4, 2, 1, 2, 1, 2))
SHAPES = ("circle", "square", "triangle-up", "diamond", "cross", "triangle-down", "triangle-right")
#: Honest clients and malicious ones.
HONEST, MALICIOUS = COLOURS[0], COLOURS[1]
_LINES = "split(datum.label, '\\n')"  # labels hold their line breaks


def of_one() -> dict[str, dict]:
    """name -> specification, of the page of one folder."""
    return {
        "heat": heat_map(),
        "curves": curves(),
        "axis": over_axis(),
        "kept": kept_by_label(),
        "clients": kept_by_client(),
        "scatter": scatter(),
    }


def of_two() -> dict[str, dict]:
    """name -> specification, of the page of two folders."""
    return {"heat": heat_map(), "difference": heat_map("purpleorange"), "curves": curves()}


def heat_map(scheme: str = "viridis") -> dict:
    """A number in every field; `fields`: x, y, value, shown, ink, picked, grid and tooltips."""
    alt = _altair()
    x = alt.X(
        "x:N",
        sort=None,
        title="@across",
        scale=alt.Scale(domain=["@*columns"], paddingInner=0.06, paddingOuter=0.03),
        axis=alt.Axis(labelAngle=-40, labelExpr=_LINES, labelOverlap=False, ticks=False),
    )
    y = alt.Y(
        "y:N",
        sort=None,
        title="@down",
        scale=alt.Scale(domain=["@*rows"], paddingInner=0.06, paddingOuter=0.03),
        axis=alt.Axis(labelExpr=_LINES, labelOverlap=False, ticks=False),
    )
    base = alt.Chart().encode(x=x, y=y, tooltip=_tooltip(("cell", "measured", "runs", "note")))
    colour = alt.Color(
        "value:Q",
        scale=alt.Scale(scheme=scheme, domain=["@low", "@high"], clamp=True),
        legend=alt.Legend(title="@metric", orient="right", gradientLength=160, format="@format"),
    )
    known = base.transform_filter("isValid(datum.value)")
    picked = base.transform_filter("datum.picked").mark_rect
    layers = [
        base.transform_filter("datum.grid").mark_rect(fill="#e4e4e4"),
        known.mark_rect(cursor="pointer").encode(fill=colour),
        base.mark_text(fontSize=alt.expr("font"), cursor="pointer").encode(
            text="shown:N", color=alt.Color("ink:N", scale=None)
        ),
        picked(filled=False, stroke="white", strokeWidth=5),
        picked(filled=False, stroke="black", strokeWidth=2),
    ]
    chart = alt.layer(*layers, data=alt.NamedData("fields"))
    return _finished(chart.add_params(alt.param("font", value=11)))


def curves() -> dict:
    """`seeds`: a thin line a run; `means`: a thick one a line, with markers at `marks`."""
    alt = _altair()
    x, y = _rounds(), _measured()
    look = _looks("line", legend=_below())
    line = dict(x=x, y=y, color=look["color"], strokeDash=look["strokeDash"])
    tips = _tooltip(("line", "run", "round", "value"))
    return _finished(
        alt.layer(
            alt.Chart(alt.NamedData("seeds"))
            .mark_line(strokeWidth=1, opacity=0.45)
            .encode(**line, detail="run:N", tooltip=tips),
            alt.Chart(alt.NamedData("means")).mark_line(strokeWidth=2.4).encode(**line),
            alt.Chart(alt.NamedData("marks"))
            .mark_point(filled=True, size=55, opacity=1)
            .encode(x=x, y=y, color=look["color"], shape=look["shape"], tooltip=tips),
        )
    )


def over_axis() -> dict:
    """A metric over a numeric axis; `points`: x, value, line, low and high over the seeds."""
    alt = _altair()
    x = alt.X("x:Q", title="@across", scale=alt.Scale(domain=["@first", "@last"], nice=False))
    y = _measured()
    look = _looks("line", legend=_below())
    base = alt.Chart(alt.NamedData("points"))
    tips = _tooltip(("line", "x", "value", "low", "high"))
    spec = _finished(
        alt.layer(
            base.mark_rule(strokeWidth=1).encode(x=x, y="low:Q", y2="high:Q", color=look["color"]),
            base.mark_line(strokeWidth=2).encode(
                x=x, y=y, color=look["color"], strokeDash=look["strokeDash"]
            ),
            base.mark_point(filled=True, size=60, opacity=1).encode(
                x=x, y=y, color=look["color"], shape=look["shape"], tooltip=tips
            ),
        )
    )
    for layer in spec["layer"]:
        layer["encoding"]["x"]["scale"]["type"] = "@scale"  # which Altair would refuse
    return spec


def kept_by_label() -> dict:
    """A small panel a label of the axis across: the share kept of either kind of client."""
    alt = _altair()
    base = alt.Chart().encode(
        x=_rounds(),
        y=alt.Y("value:Q", title="clients kept (%)", scale=alt.Scale(domain=[0, 100])),
        tooltip=_tooltip(("label", "who", "round", "value")),
        **_who("color", "strokeDash"),
    )
    marks = base.transform_filter("datum.mark").mark_point(filled=True, size=40, opacity=1)
    chart = alt.layer(base.mark_line(strokeWidth=2), marks.encode(**_who("shape")))
    facet = alt.Facet(
        "label:N",
        sort=["@*labels"],
        title=None,
        header=alt.Header(labelLimit=0, labelFontWeight="bold", labelExpr=_LINES),
    )
    panels = chart.properties(width=200, height=110, data=alt.NamedData("shares"))
    return _finished(panels.facet(facet=facet, columns=4))


def kept_by_client() -> dict:
    """A field a client and round, the darker the more of it was kept; honest above malicious."""
    alt = _altair()
    axis = alt.Axis(labelOverlap="greedy", labelAngle=0, ticks=False)
    chart = (
        alt.Chart(alt.NamedData("fields"))
        .mark_rect(stroke="#999999", strokeWidth=0.3)
        .encode(
            x=alt.X("round:O", title="round", sort=None, axis=axis),
            y=alt.Y(
                "client:O",
                title="client",
                axis=alt.Axis(labelOverlap="greedy", ticks=False),
            ),
            color=alt.Color(
                "share:Q",
                title="kept (%)",
                scale=alt.Scale(range=["#ffffff", "#08306b"], domain=[0, 100], interpolate="rgb"),
                legend=alt.Legend(gradientLength=100),
            ),
            row=alt.Row(
                "who:N",
                sort=["honest", "malicious"],
                title=None,
                header=alt.Header(labelAngle=0, labelAlign="left", labelFontWeight="bold"),
            ),
            tooltip=_tooltip(("who", "client", "round", "share")),
        )
        .resolve_scale(y="independent")
        .configure_view(fill="#d4d4d4", stroke="#999999")
    )
    return _finished(chart)


def scatter() -> dict:
    """Success of the backdoor against the headline: `runs` are small, means over seeds large."""
    alt = _altair()
    look = _looks(
        "line", legend=alt.Legend(orient="right", title="@across", symbolSize=90, symbolOpacity=1)
    )
    x = alt.X("x:Q", title="@headline", scale=alt.Scale(domain=["@low", "@high"], nice=False))
    y = alt.Y("y:Q", title="backdoor success (%)", scale=alt.Scale(domain=[-2, 102], nice=False))
    base = alt.Chart().encode(x=x, y=y, color=look["color"], shape=look["shape"])
    tips = _tooltip(("cell", "x", "y"))
    runs = base.properties(data=alt.NamedData("runs"))
    means = base.properties(data=alt.NamedData("means"))
    return _finished(
        alt.layer(
            runs.mark_point(filled=True, size=18, opacity=0.4).encode(tooltip=tips),
            means.mark_point(filled=True, size=90, opacity=0.95, cursor="pointer").encode(
                tooltip=tips
            ),
            means.mark_point(size=260, strokeWidth=2, filled=False).encode(
                color=alt.value("black"),
                shape=alt.value("circle"),
                opacity=alt.condition("datum.picked", alt.value(1), alt.value(0)),
            ),
        )
    )


# --- Parts --------------------------------------------------------------------------------------


def _altair() -> Any:
    return require("altair", "A page of results")


def _rounds():
    alt = _altair()
    axis = alt.Axis(tickMinStep=1, format="d")
    return alt.X("round:Q", title="round", axis=axis, scale=alt.Scale(nice=False))


def _measured():
    alt = _altair()
    scale = alt.Scale(domain=["@low", "@high"], zero=False, nice=False)
    axis = alt.Axis(format=".4~g")  # a loss may be 1e15, which must not push the chart aside
    return alt.Y("value:Q", title="@metric", scale=scale, axis=axis)


def _looks(field: str, legend) -> dict:
    """Colour, dash and shape of a label together, in one legend."""
    alt = _altair()
    made = {}
    kinds = {"color": alt.Color, "strokeDash": alt.StrokeDash, "shape": alt.Shape}
    for name, kind in kinds.items():
        scale = alt.Scale(domain=["@*lines"], range=[f"@*{name}"])
        made[name] = kind(f"{field}:N", sort=None, scale=scale, legend=legend)
    return made


def _below():
    return _altair().Legend(orient="bottom", columns=1, title=None, symbolSize=110, symbolOpacity=1)


def _who(*channels: str) -> dict:
    alt = _altair()
    ranges = {
        "color": [HONEST, MALICIOUS],
        "strokeDash": [list(DASHES[0]), list(DASHES[1])],
        "shape": ["circle", "triangle-up"],
    }
    kinds = {"color": alt.Color, "strokeDash": alt.StrokeDash, "shape": alt.Shape}
    legend = alt.Legend(orient="top", title=None, symbolSize=110)
    return {
        name: kinds[name](
            "who:N",
            scale=alt.Scale(domain=["honest", "malicious"], range=ranges[name]),
            legend=legend,
        )
        for name in channels
    }


def _tooltip(fields) -> list:
    alt = _altair()
    return [alt.Tooltip(f"{name}:N") for name in fields]  # the script rounds numbers


def _finished(chart) -> dict:
    """The specification with what all charts share: labels are never cut."""
    chart = chart.configure_axis(
        labelLimit=0, titleLimit=0, labelFontSize=11, titleFontSize=12, gridColor="#e4e4e4"
    )
    chart = chart.configure_legend(labelLimit=0, titleLimit=0, labelFontSize=11, titleFontSize=12)
    spec = chart.to_dict()
    spec.pop("$schema")  # the address of a page
    return spec
