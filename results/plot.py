"""Draw the figures of results/ from its records, and write the tables of its texts and of README.md.

    pip install matplotlib && python results/plot.py              # tables and figures
    python results/plot.py --tables                               # the tables alone

A table of tables.py stands between <!-- TITLE --> and <!-- end --> in one of TEXTS; change tables.py, not
the text.
"""
import re
import sys
from collections import defaultdict
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).resolve().parent))

from parts import (METHODS, OPTIMIZERS, RESULTS, ROOT, frontier, pairs, read, seeds, trained, tuning_loss,
                   unscaled)
from prepare import Parser, UserError, one_line_errors
from tables import (BOUND_LABELS, LABELS, LARGE, OPTIMIZER_LABELS, WIDTH_COLUMNS, all_tables, book_name,
                    by_bound, by_strength, large_runs, largest_entries, largest_norms, longest_books, of_pair,
                    papers, power, power_of_width, sphere_kinds, who)

TEXTS = ROOT / "README.md", *(RESULTS / f"{name}.md" for name in ("README", "tables", "speed"))

# Okabe and Ito's colours, which the colour-blind can tell apart; grey for their yellow, faint on white
COLORS = dict(zip(METHODS, ("#0072B2", "#009E73", "#000000", "#56B4E9", "#E69F00", "#CC79A7", "#999999",
                            "#D55E00")))
COMPARED = {"soft_cap": "#999999", "spectral_normalize": "#56B4E9", "stiefel": "#E69F00",
            "spectral_sphere": "#0072B2", "hyperball": "#D55E00", "none": "#000000"}  # in spheres.png
LINES = {"muon": dict(linestyle="-", marker="o"),
         "adamw": dict(linestyle=":", marker="s", markerfacecolor="white")}
WIDEST = 20  # log10 of the largest bound that is drawn


# --- Records ------------------------------------------------------------------------------------------------

def load():
    """{part: records}, those of speed.jsonl under "speed, WHAT", of gpu.jsonl under "gpu, JOB"."""
    runs = defaultdict(list)
    for name in ("shakespeare", "tight", "cifar", "books", "published", "deciding"):
        for record in read(RESULTS / f"{name}.jsonl"):
            runs[record["part"]].append(record)
    for record in read(RESULTS / "speed.jsonl"):
        runs[f"speed, {record['what']}"].append(record)
    for record in read(RESULTS / "gpu.jsonl"):
        runs[f"gpu, {record['job']}"] += [record] * ("trace" in record)
    return runs


# --- Figures ------------------------------------------------------------------------------------------------

def math_power(log10_x):
    """power, for matplotlib."""
    return re.sub(r"·10\^(\d+)", r"$\\cdot 10^{\1}$", power(log10_x))


def panels(plt, rows=1, columns=1, size=(7.5, 4.5), **shared):
    figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False, **shared)
    for ax in axes.flat:
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes if rows > 1 else axes[0]


def optimizer_handles(plt):
    """Of a legend."""
    return [plt.Line2D([], [], color="black", label=OPTIMIZER_LABELS[o], **LINES[o]) for o in OPTIMIZERS]


def method_handles(plt):
    return [plt.Line2D([], [], color=COLORS[m], linewidth=3, label=LABELS[m]) for m in METHODS]


def percent(values):
    return [100 * value for value in values]


def tradeoff(runs, plt):
    """Accuracy and loss against both bounds: what every method and optimizer reaches with the paper's shape,
    dominated runs left out, and in grey what the search over shapes and scales reaches.
    """
    figure, axes = panels(plt, 2, 2, (11, 8), sharex=True, sharey="row")

    def line(column, records, bound, **look):
        points = [r for r in frontier(trained(records), bound) if r[bound] <= WIDEST]
        for ax, y, unit in zip(column, ("val_acc", "val_loss"), (100, 1)):
            ax.plot([10 ** r[bound] for r in points], [r[y] * unit for r in points], **look)

    for (bound, label), column in zip(BOUND_LABELS.items(), axes.T):
        line(column, runs["headline"], bound, color="#DDDDDD", linewidth=6)
        for method, optimizer in pairs():
            line(column, of_pair(runs["grid"], method, optimizer), bound, color=COLORS[method], markersize=5,
                 linewidth=1.5, **LINES[optimizer])
        column[0].set_xscale("log")
        column[-1].set_xlabel(label)
    axes[0, 0].set_ylabel("accuracy on the validation split, %")
    axes[1, 0].set_ylabel("validation loss, nats per character")
    other = plt.Line2D([], [], color="#DDDDDD", linewidth=6, label="best of other shapes")
    figure.legend(handles=[*method_handles(plt), *optimizer_handles(plt), other], loc="outside right center",
                  frameon=False)
    return figure


def spheres(runs, plt):
    """Accuracy of the constraints of 2026 against the certified bound, beside the paper's, all with Muon."""
    figure, (ax, ) = panels(plt)
    for kind, found in sphere_kinds(runs):
        points = [r for r in frontier(found, "log10_certified") if r["log10_certified"] <= WIDEST]
        if points and kind["method"] in COMPARED:
            ax.plot([10 ** r["log10_certified"] for r in points], percent(r["val_acc"] for r in points),
                    "--" if kind.get("tangent") else "-", marker="o", markersize=4,
                    color=COMPARED[kind["method"]], label=who(kind).removeprefix("Muon, "))
    ax.set(xscale="log", xlabel=BOUND_LABELS["log10_certified"],
           ylabel="accuracy on the validation split, %")
    ax.legend(frameon=False, fontsize=9)
    return figure


def sphere_books(runs, plt):
    """The same over ten times the text: loss, and the largest entries and norms, each at its best rate."""
    figure, axes = panels(plt, 1, 3, (12, 4))
    worst_first = sorted(trained(runs["sphere-books"]), key=tuning_loss, reverse=True)
    best = {run["options"]["method"]: run for run in worst_first}
    for run in best.values():
        options, trace = run["options"], run["trace"]
        for ax, y in zip(axes, (trace["val_loss"], largest_entries(run), largest_norms(run))):
            ax.plot(trace["step"], y, color=COMPARED[options["method"]],
                    label=who(options).removeprefix("Muon, "))
    for ax, label in zip(axes, ("loss on 32,768 characters, nats", "largest entry behind a block",
                                "largest RMS→RMS norm of a matrix")):
        ax.set(xlabel="step of 4,096 characters", ylabel=label)
    axes[0].set_ylim(top=1.6)
    axes[2].set_yscale("log", base=2)
    axes[2].yaxis.set_major_formatter("{x:g}")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=6, frameon=False)
    return figure


def norms(runs, plt):
    """The largest norm of a matrix over training at the middle strength, and the cap where there is one."""
    figure, axes = panels(plt, 2, 4, (11, 5), sharex=True, sharey=True)
    for method, ax in zip(METHODS, axes.flat):
        for optimizer in OPTIMIZERS:
            for run in by_strength(trained(runs["grid"]), method, optimizer)[2:3]:
                ax.plot(run["trace"]["step"], largest_norms(run), color=COLORS[method], markersize=4,
                        **LINES[optimizer])
                if cap := run["options"].get("w_max"):
                    ax.axhline(cap, color="black", linewidth=0.8, linestyle="--")
        ax.set_title(LABELS[method], fontsize=10)
        ax.set_yscale("log", base=2)
        ax.yaxis.set_major_formatter("{x:g}")
    figure.supxlabel("step")
    figure.supylabel("largest RMS→RMS norm of a matrix")
    cap = plt.Line2D([], [], color="black", linewidth=0.8, linestyle="--", label="w_max")
    figure.legend(handles=[*optimizer_handles(plt), cap], loc="outside upper center", ncols=3, frameon=False)
    return figure


def headline(runs, plt):
    """Accuracy over training of the paper's shape under a published bound of 2, 65 million characters."""
    figure, (ax, ) = panels(plt)

    def curve(run, line, label, published, **look):
        millions = [step * run["options"]["batch_size"] * 256 / 1e6 for step in run["trace"]["step"]]
        ax.plot(millions, percent(run["trace"]["val_acc"]), line, **look,
                label=f"{label}: published {10 ** published:.2f}, "
                      f"certified {math_power(run['log10_certified'])}")

    for run in runs["long"] + runs["longest"]:
        o = run["options"]
        line = "--" if o["max_steps"] > 500 else "-" if o["lr"] > 0.03 else ":"
        curve(run, line, f"{o['n_head']} heads, lr {o['lr']:g}, {o['max_steps']:,} steps", unscaled(run),
              color={32: "#0072B2", 64: "#D55E00"}[o["n_head"]])
    for run in runs["letter-long"]:
        curve(run, "k-", "the best by the letter", run["log10_published"])
    for run in runs["published-whole"][-1:]:
        o = run["options"]
        ax.plot(o["max_steps"] * o["batch_size"] * o["block_size"] / 1e6, 100 * run["val_acc"], "k*",
                label=f"a head of $10^{{-8}}$, whole split: published {10 ** run['log10_published']:.2f}, "
                      f"certified {math_power(run['log10_certified'])}")
    ax.axhline(60, color="black", linewidth=0.8, linestyle="--")
    ax.annotate("the paper's 60 %, at a bound of 2", (40, 60.3), fontsize=9)
    ax.set(xlabel="characters trained on, millions", ylabel="accuracy on 4,096 characters, %", ylim=(14, 62))
    ax.legend(frameon=False, fontsize=8, loc="lower right")
    return figure


def draw_certified(ax, run, leftmost, line, attacked, **look):
    """Certified accuracy against the radius, and crosses for what an attack leaves: (radii, shares)."""
    radii = [10 ** x for x in run["log10_radii"]]
    share = [100 * run["val_acc"] * (1 - i / (len(radii) - 1)) for i in range(len(radii))]
    ax.plot([leftmost, radii[0], *radii], [share[0], share[0], *share], line, **look)
    if attacked:
        left = percent(at["attack_first"] for at in run["radii"].values())
        ax.plot([float(r) for r in run["radii"]], left, "x", color=look["color"])
    return radii, share


def radius(runs, plt):
    """Certified accuracy against the radius, linear and log: the headline's models and the presets'."""
    figure, axes = panels(plt, 1, 2, (11, 4.5), sharey=True)
    robust = [seeds for seeds in by_bound(runs["robust"]) if len(seeds) > 1] + by_bound(runs["gce"])
    for name, lists, colors, line in (("paper's architecture", papers(runs), "Blues_r", "-"),
                                      ("presets", by_bound(runs["tight"]), "Oranges_r", "--"),
                                      ("trained for a radius; ×: attacked", robust, "Greens_r", "-.")):
        for i, (run, *_) in enumerate(lists):
            color = plt.get_cmap(colors)(0.7 * i / len(lists))
            at = 10 + 5 * i if name.startswith("paper") else 20  # labels at other heights, to stay apart
            for ax in axes:
                radii, share = draw_certified(ax, run, 1e-12, line, lists is robust, color=color,
                                              label=None if i else name)
                if ax is axes[1] or radii[at] > 0.004:
                    ax.annotate(math_power(run["log10_certified"]), (radii[at], share[at]), (3, 3),
                                color=color, textcoords="offset points", fontsize=8)
    axes[0].set(xlim=(0, 0.2), ylabel="certified accuracy, %")
    axes[1].set(xlim=(1e-11, 1), xscale="log")
    for ax in axes:
        ax.set_xlabel("radius: change of any embeddings, in RMS norm")
    axes[0].legend(frameon=False, fontsize=9, title="curves are named by their certified bound",
                   title_fontsize=9)
    return figure


def tight(runs, plt):
    """Accuracy against the bound: the presets and the paper's architecture, means of three seeds."""
    figure, (ax, ) = panels(plt)
    for name, lists, look in (("paper's architecture", papers(runs), dict(color="#0072B2", marker="o")),
                              ("presets tight and tight-content", by_bound(runs["tight"]),
                               dict(color="#D55E00", marker="s"))):
        accuracy = [100 * mean(r["val_acc"] for r in same) for same in lists]
        at = lambda bound: [10 ** max(r[bound] for r in same) for same in lists]
        ax.plot(at("log10_certified"), accuracy, label=f"{name}: certified", **look)
        ax.plot(at("log10_attack"), accuracy, label="the same models: attack", linestyle=":",
                markerfacecolor="white", **look)
    ax.set(xscale="log", xlabel="Lipschitz constant, embeddings to logits",
           ylabel="accuracy on the validation split, %")
    ax.legend(frameon=False)
    return figure


def cifar(runs, plt):
    """On images: accuracy against the bound, every method and optimizer at four strengths; and what the
    attack leaves of models of equal accuracy, unconstrained and constrained, means of three seeds.
    """
    figure, (left, right) = panels(plt, 1, 2, (12, 4.5))
    for method, optimizer in pairs():
        found = by_strength(trained(runs["cifar-grid"]), method, optimizer)
        left.plot([10 ** r["log10_certified"] for r in found], percent(r["val_acc"] for r in found),
                  color=COLORS[method], markersize=5, linewidth=1.5, **LINES[optimizer])
    left.set(xscale="log", xlabel="certified Lipschitz bound, pixels to logits",
             ylabel="accuracy on the test images, %")
    for same, color in zip(seeds(runs["cifar-pairs"]), ("#0072B2", "#56B4E9", "#D55E00", "#E69F00")):
        options, radii = same[0]["options"], same[0]["attacked"]
        left_over = [100 * mean(r["attacked"][eps] for r in same) for eps in radii]
        strength = options.get("weight_decay", options.get("w_max"))
        free = f"{LABELS[options['method']]} {strength:g}" if strength else "unconstrained"
        bound = math_power(max(r["log10_certified"] for r in same))
        label = f"{OPTIMIZER_LABELS[options['optimizer']]}, {free}: bound {bound}"
        right.plot([int(eps) for eps in radii], left_over, label=label, color=color,
                   **LINES[options["optimizer"]])
    right.set(xlabel="radius of the attack, L2 norm of a change of the pixels, 255ths",
              ylabel="accuracy that it leaves, %")
    right.legend(frameon=False, fontsize=9)
    figure.legend(handles=[*method_handles(plt), *optimizer_handles(plt)], loc="outside left center",
                  frameon=False)
    return figure


def books(runs, plt):
    """Forty times Shakespeare's text: accuracy over training, and certified accuracy against the radius."""
    figure, (left, right) = panels(plt, 1, 2, (12, 4.5))
    for (run, *_), color in zip(longest_books(runs), COLORS.values()):
        millions = [step * 16 * 256 / 1e6 for step in run["trace"]["step"]]
        left.plot(millions, percent(run["trace"]["val_acc"]), color=color,
                  label=f"{book_name(run)}: {math_power(run['log10_certified'])}")
        draw_certified(right, run, 1e-15, "-", True, color=color)
    left.set(xlabel="characters trained on, millions", ylabel="accuracy on 32,768 characters, %")
    left.set_ylim(bottom=30)
    right.set(xscale="log", xlim=(1e-12, 1), ylabel="certified accuracy, %",
              xlabel="radius: change of any embeddings, in RMS norm; ×: attacked")
    left.legend(frameon=False, fontsize=9, title="model: certified bound", title_fontsize=9)
    return figure


def activations(runs, plt):
    """GPT-2 tokens: the largest entry and RMS norm of a token's vector behind every block, over training."""
    figure, axes = panels(plt, 1, 2, (12, 4.5))
    best_nanogpt = sorted(runs["nanogpt"], key=lambda r: r["val_loss"])[:1]
    for run, color in zip(runs["tokens"] + best_nanogpt, COLORS.values()):
        for ax, kind in zip(axes, ("act_max_layers", "act_rms_layers")):
            for i, layer in enumerate(zip(*run["trace"][kind])):
                ax.plot(run["trace"]["step"], layer, color=color, linewidth=1 + 0.5 * i,
                        label=None if i else book_name(run))
    for ax, label in zip(axes, ("largest entry", "largest RMS norm of a token")):
        ax.set(xlabel="step of 8,192 tokens; deeper layers thicker", ylabel=f"{label} behind a block")
        ax.set_yscale("log", base=2)
        ax.yaxis.set_major_formatter("{x:g}")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=5, frameon=False)
    return figure


def speed(runs, plt):
    """Accuracy on the whole validation split of Shakespeare against seconds of training, beside nanoGPT."""
    figure, (ax, ) = panels(plt)
    for run, color in zip(runs["speed, curve"], COLORS.values()):
        ax.plot(run["trace"]["seconds"], percent(run["trace"]["val_acc"]), "o-", markersize=4, color=color,
                label=run["name"])
    ax.set(xlabel="seconds of training, compiling included, evaluations not; two cores, if not one thread",
           ylabel="accuracy on the validation split, %")
    ax.legend(frameon=False)
    return figure


def large(runs, plt):
    """145 M parameters on the books: loss and largest entry of an activation over training."""
    figure, axes = panels(plt, 1, 2, (12, 4.5))
    for run, color in zip(large_runs(runs), COLORS.values()):
        millions = [step * 65_536 / 1e6 for step in run["trace"]["step"]]
        for ax, y in zip(axes, ("val_loss", "act_max")):
            ax.plot(millions, run["trace"][y], "o-", markersize=4, color=color, label=LARGE[run["job"]])
    for ax, label in zip(axes, ("loss on held-out books, nats per token", "largest entry of an activation")):
        ax.set(xlabel="tokens trained on, millions", ylabel=label)
    axes[1].set_yscale("log")
    axes[0].legend(frameon=False)
    return figure


def widths(runs, plt):
    """Seconds and memory of a step and of the certificate against the width."""
    records = sorted(runs["speed, width"], key=lambda r: r["width"])
    widths = [r["width"] for r in records]
    figure, axes = panels(plt, 1, 2, (9, 4))
    for name, key in WIDTH_COLUMNS.items():
        ax = axes[1 if key == "peak_gb" else 0]
        ax.loglog(widths, [r[key] for r in records], marker="o", markersize=4,
                  label=f"{name.rsplit(',')[0]}: power {power_of_width(records, key):.2f} at the end")
    for ax, unit in zip(axes, ("seconds", "GB")):
        ax.minorticks_off()
        ax.set(xlabel="width", ylabel=unit, xticks=widths, xticklabels=widths)
        ax.legend(frameon=False, fontsize=9, loc="lower right")
    return figure


def deciding(runs, plt, columns=48, lines=12):
    """Validation text, each character on the color of how many before it decide it; wrong ones are red."""
    run = runs["deciding"][0]
    figure, (ax, ) = panels(plt, size=(8, 3.6))
    colors = dict(zip(run["deciding"]["decided"], plt.cm.YlGn_r([x / 8 for x in range(8)])))
    row, column = 0, 0
    for token, right, D in run["deciding"]["characters"]:
        character = run["vocabulary"][token]
        if character != "\n":
            color = colors.get(str(D and int(D)), "white")
            ax.text(column, -row, character, family="monospace", fontsize=9, ha="center", va="center",
                    color="black" if right else "#c00000",
                    bbox=dict(facecolor=color, edgecolor="none", boxstyle="square,pad=0.12"))
        column += 1
        if character == "\n" or column == columns:
            row, column = row + 1, 0
        if row == lines:
            break
    ax.set(xlim=(-1, columns), ylim=(-lines, 1))
    ax.axis("off")
    handles = [plt.Rectangle((0, 0), 1, 1, color=color, label=D) for D, color in colors.items()]
    ax.legend(handles=handles, title="decided by the last", ncols=8, frameon=False, loc="upper center",
              bbox_to_anchor=(0.5, 1.15))
    return figure


FIGURES = (tradeoff, spheres, sphere_books, norms, headline, radius, tight, cifar, books, activations, speed,
           deciding)


def fill(text, tables):
    """A text with its tables between their markers."""
    for title, made in tables.items():
        between = rf"(<!-- {re.escape(title)} -->\n).*?(?=<!-- end -->)"
        text = re.sub(between, lambda m: f"{m[1]}{made}", text, flags=re.DOTALL)
    return text


def main():
    parser = Parser(description=__doc__.strip().split("\n")[0])
    parser.add_argument("--tables", action="store_true", help="write the tables and draw nothing")
    args = parser.parse_args()
    with one_line_errors("plot.py"):
        runs = load()
        if not runs["grid"]:
            raise UserError(f"{RESULTS}/shakespeare.jsonl has no runs; python results/sweep.py makes them")
        tables = all_tables(runs)
        for path in TEXTS:
            path.write_text(fill(path.read_text(), tables))
        if args.tables:
            return
        try:
            import matplotlib.pyplot as plt
        except ImportError:
            raise UserError("the figures need matplotlib: pip install matplotlib")
        later = (large, ) * bool(large_runs(runs)) + (widths, ) * bool(runs["speed, width"])
        for draw in FIGURES + later:
            draw(runs, plt).savefig(RESULTS / f"{draw.__name__}.png", dpi=150)


if __name__ == "__main__":
    main()
