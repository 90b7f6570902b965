"""The certificate as one page of HTML that needs nothing else: verdict, a bar per metric, what it rests on."""

from collections.abc import Iterator
from html import escape

from search.certificate import Certificate
from search.margin_verdicts import MetricVerdict
from search.readable import readable

_COLOURS = {"PASS": "#1a7f37", "FAIL": "#b42318", "INCONCLUSIVE": "#9a6700"}
_STYLE = """
body { font: 14px/1.45 system-ui, sans-serif; color: #1f2328; max-width: 68rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin: 0 0 .2rem; } h2 { font-size: 1.05rem; margin: 1.8rem 0 .5rem; }
.verdict { color: #fff; border-radius: .4rem; padding: .8rem 1rem; font-size: 1.25rem; margin: 1rem 0; }
table { border-collapse: collapse; width: 100%; } th { text-align: left; font-weight: 600; color: #57606a; }
th, td { padding: .35rem 1rem .35rem 0; border-bottom: 1px solid #d8dee4; vertical-align: top; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
svg { display: block; }
.small { color: #57606a; font-size: .85rem; } code { font-size: .8rem; overflow-wrap: anywhere; }
"""

_WIDTH, _HEIGHT = 150, 22  # of a bar, in pixels
_LOW, _HIGH = -0.25, 1.5  # its ends, as shares of the margin; what lies beyond is drawn at the end


def certificate_page(certificate: Certificate) -> str:
    """Return the page of a certificate."""
    title = f"{certificate.verdict}: {certificate.model.kind} {certificate.model.source}"
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{_STYLE}</style></head><body>\n" + "\n".join(_body(certificate)) + "\n</body></html>\n"
    )


def _body(certificate: Certificate) -> Iterator[str]:
    model = certificate.model
    yield "<h1>Certificate of a quantized video model</h1>"
    yield f'<div class="small">{escape(f"{model.kind} {model.source}, study {certificate.study}")}, '
    yield f"{escape(certificate.created)}</div>"
    colour = _COLOURS[certificate.verdict]
    yield f'<div class="verdict" style="background:{colour}">{escape(certificate.headline())}</div>'
    yield (
        "<p>Float and exported weights rendered the same prompts from the same noise. A metric passes if its mean over "
        f"all such prompts is shown to keep its margin. Of models beyond a margin at most {100 * certificate.alpha:g}% "
        "pass, over all metrics together (Holm). Pairs of one prompt count as one observation.</p>"
    )
    yield "<h2>Metrics</h2><table><tr><th>metric</th><th>margin</th>"
    yield '<th class="number">float</th><th class="number">quantized</th>'
    yield f'<th class="number">difference<div class="small">{100 * (1 - certificate.alpha):g}% interval</div></th>'
    yield '<th>margin used</th><th class="number">p<div class="small">adjusted</div></th><th>verdict</th></tr>'
    yield from (_row(metric) for metric in certificate.metrics)
    yield "</table>"
    yield (
        '<p class="small">In the bars the left line is the float model, the right one the margin; the dot is the mean, '
        "the line through it the interval.</p>"
    )
    yield "<h2>Where it is worst</h2><table><tr><th>metric</th><th>prompt</th>"
    yield '<th class="number">seed</th><th class="number">float</th><th class="number">quantized</th></tr>'
    yield from (_worst_row(certificate, metric) for metric in certificate.metrics if _differs(metric))
    yield "</table>"
    yield "<h2>What it rests on</h2><table>"
    yield from (f"<tr><th>{escape(name)}</th><td>{value}</td></tr>" for name, value in _facts(certificate))
    yield "</table>"


def _row(metric: MetricVerdict) -> str:
    low, high = _number(metric.low), _number(metric.high)
    cells = [
        f"<td>{escape(metric.metric)}<div class='small'>{escape(metric.unit)}</div></td>",
        f"<td>{escape(metric.margin.in_words())}</td>",
        f'<td class="number">{_number(metric.float_mean)}</td>',
        f'<td class="number">{_number(metric.mean)}</td>',
        f'<td class="number">{_number(metric.difference)}<div class="small">{low} to {high}</div></td>',
        f"<td>{_bar(metric)}</td>",
        f'<td class="number">{metric.p_adjusted:.2g}</td>',
        f'<td><b style="color:{_COLOURS[metric.verdict]}">{metric.verdict}</b>'
        f'<div class="small">{escape(metric.reason)}</div></td>',
    ]
    return f"<tr>{''.join(cells)}</tr>"


def _worst_row(certificate: Certificate, metric: MetricVerdict) -> str:
    index = max(range(len(metric.values)), key=lambda index: _badness(metric, index))
    pair, value = certificate.pairs[index], metric.values[index]
    numbers = (pair.seed, _number(metric.float_values[index]), _number(value))
    cells = "".join(f'<td class="number">{number}</td>' for number in numbers)
    return f"<tr><td>{escape(metric.metric)}</td><td>{escape(pair.prompt)}</td>{cells}</tr>"


def _differs(metric: MetricVerdict) -> bool:
    return metric.values != metric.float_values


def _badness(metric: MetricVerdict, index: int) -> float:
    value = metric.values[index]
    if value is None:
        return float("inf")
    used = used_share(metric, value - metric.float_values[index])
    return abs(value - metric.float_values[index]) if used is None else used


def used_share(metric: MetricVerdict, difference: float) -> float | None:
    """Return which share of its margin a difference from float takes: 0 for none, 1 at the margin, below 0 for better.

    None where float itself does not lie within the margin.
    """
    margin, worse = metric.margin, -difference if metric.direction == "maximize" else difference
    if margin.loss is not None:
        return worse / margin.loss
    shares = []
    for bound, sign in ((margin.min, -1.0), (margin.max, 1.0)):
        if bound is not None:
            room = sign * (bound - metric.float_mean)
            if room <= 0.0:
                return None
            shares.append(sign * difference / room)
    return max(shares)


def _bar(metric: MetricVerdict) -> str:
    differences = (metric.low, metric.difference, metric.high)
    shares = [None if difference is None else used_share(metric, difference) for difference in differences]
    drawn = sorted(_place(share) for share in shares if share is not None)
    zero, one, middle = _place(0.0), _place(1.0), _HEIGHT / 2
    parts = [
        f'<line x1="{x:.1f}" x2="{x:.1f}" y1="2" y2="{_HEIGHT - 2}" stroke="{colour}" stroke-width="1.5"/>'
        for x, colour in ((zero, "#57606a"), (one, "#b42318"))
    ]
    if len(drawn) == len(shares):
        centre = _place(shares[1] or 0.0)
        colour = _COLOURS[metric.verdict]
        parts.append(
            f'<line x1="{drawn[0]:.1f}" x2="{drawn[-1]:.1f}" y1="{middle}" y2="{middle}" stroke="{colour}" '
            'stroke-width="3"/>'
        )
        parts.append(f'<circle cx="{centre:.1f}" cy="{middle}" r="4.5" fill="{colour}"/>')
    label = "not known" if shares[1] is None else f"{shares[1]:.0%} of the margin used"
    return (
        f'<svg width="{_WIDTH}" height="{_HEIGHT}" role="img" aria-label="{label}"><title>{label}</title>'
        f"{''.join(parts)}</svg>"
    )


def _place(share: float) -> float:
    """Return where a share of the margin lies in the bar, in pixels."""
    return 6 + (min(max(share, _LOW), _HIGH) - _LOW) / (_HIGH - _LOW) * (_WIDTH - 12)


def _facts(certificate: Certificate) -> Iterator[tuple[str, str]]:
    settings, software = certificate.settings, certificate.software
    seeds = len(certificate.pairs) // certificate.num_prompts
    yield (
        "prompts",
        f"{certificate.num_prompts} held out, {seeds} seeds each, digest <code>{certificate.prompts_digest}</code>",
    )
    yield (
        "clip",
        f"{settings.width}x{settings.height}, {settings.num_frames} frames, {settings.num_steps} steps, guidance "
        f"{settings.guidance_scale:g}",
    )
    judge = certificate.judge
    yield "judge", escape(" ".join(filter(None, (judge.model, judge.pretrained, f"({judge.view})"))))
    yield "float model", f"<code>{escape(certificate.model.fingerprint)}</code> in {escape(certificate.model.dtype)}"
    yield "quantization", f"<code>{escape(certificate.config.model_dump_json(exclude_none=True))}</code>"
    yield "device", escape(", ".join((software.device, *software.kernels)))
    yield "packages", escape(", ".join(f"{name} {version}" for name, version in software.packages.items()))
    files = "<br>".join(f"<code>{digest}</code> {escape(name)}" for name, digest in certificate.files.items())
    yield "files, SHA-256", files


def _number(value: float | None) -> str:
    return "-" if value is None else readable(round(value, 7))
