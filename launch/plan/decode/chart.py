"""A picture of what a smaller cache buys: tokens/s of a chip against the memory factor."""

from collections.abc import Sequence

from launch import charts
from launch.plan.decode.caches import STANDARD
from launch.plan.decode.result import CacheDoesNotFit, DecodePlan

SIZE = (1000, 640)  # pixels
BOX = (110, 70, 950, 520)
SELECTIVE, BASELINE, LIMIT = "#0b6e99", "#c2571a", "#b5b5b5"


def draw(plans: Sequence[DecodePlan | CacheDoesNotFit], title: str, path: str) -> None:
    """Draws the plans that fit into a PNG at `path`; `title` says of what they are."""
    figure = charts.new_figure(*SIZE, background="white")
    fitting = sorted((p for p in plans if isinstance(p, DecodePlan)), key=lambda plan: plan.memory_factor)
    if fitting:
        from matplotlib.ticker import EngFormatter, LogLocator

        axes = charts.add_axes(figure, BOX, x="memory factor, slots a layer", y="tokens/s of a chip, estimated")
        pruned = [plan for plan in fitting if plan.name != STANDARD] or fitting
        factors = [plan.memory_factor for plan in pruned]
        speed = [plan.tokens_per_second_per_chip for plan in pruned]
        bound = [tokens * plan.step_ms / plan.hbm_limit_ms for tokens, plan in zip(speed, pruned, strict=True)]
        axes.plot(factors, bound, "--", color=LIMIT, linewidth=3, label="what HBM's bandwidth allows")
        for plan in fitting:
            if plan.name == STANDARD and plan not in pruned:
                y, label = plan.tokens_per_second_per_chip, f"standard model, full cache: {_rounded(plan)}"
                axes.plot([factors[0], factors[-1]], [y, y], color=BASELINE, linewidth=3, label=label)
        axes.plot(factors, speed, "o-", color=SELECTIVE, linewidth=3, markersize=10, label="this model", clip_on=False)
        for plan in pruned:
            at = plan.memory_factor, plan.tokens_per_second_per_chip
            text = f"{_rounded(plan)}\nbatch {plan.batch_size:,}"
            axes.annotate(text, at, (0, 22), textcoords="offset points", ha="center", color=SELECTIVE, size=13)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_ylim(top=2 * max(bound))
        slots = [sum(plan.budgets) / len(plan.budgets) for plan in pruned]
        ticks = [f"{factor:.3g}\n{mean:,.4g}" for factor, mean in zip(factors, slots, strict=True)]
        axes.set_xticks(factors, ticks, minor=False)
        axes.set_xticks([], minor=True)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(EngFormatter())
        axes.set_title(title, loc="left", size=17, pad=18)
        figure.legend(*axes.get_legend_handles_labels(), loc="lower center", ncols=3, frameon=False, fontsize=14)
    charts.png(figure, path)


def _rounded(plan: DecodePlan) -> str:
    return f"{plan.tokens_per_second_per_chip:,.0f}"
