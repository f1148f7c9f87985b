"""What `sdfast bench` recorded, as the records that the report's tables are made of."""

from __future__ import annotations

from typing import Any

Row = dict[str, Any]
# Operations that share a table.
_TABLES = {"add_noise": "diffusion_step", "reparameterize": "diffusion_step"}


def expand(file: str, record: Row) -> dict[str, Row]:
    """Records by "device/kind.json".

    Raises:
        ValueError: the record is of a quick run, whose small models are none of the report's.
    """
    device = file.split("/")[0]
    if record["quick"]:
        raise ValueError(f"{file}: recorded with --quick")
    shared = {
        "file": file, "command": record["command"], "environment": record["environment"],
        "versions": record["environment"]["versions"],
        "copy_gb_per_s": record["limits"]["copy_gb_per_s"],
    }  # fmt: skip
    kinds: dict[str, list[Row]] = {}
    ops = {row["op"] for row in record["rows"] if row["part"] == "ops"}
    together = {*_TABLES, *_TABLES.values()}
    if ops & together and together - ops:
        raise ValueError(f"{file}: without {together - ops}, which its other operations share a table with")
    for row in record["rows"]:
        if "sides" not in row or row["part"] == "images":
            continue
        if row["part"] == "ops":
            kinds.setdefault(_TABLES.get(row["op"], row["op"]), []).append(_operation(row))
        elif row["part"] == "models":
            kinds.setdefault("models", []).append(_model(row))
            kinds.setdefault("peers", []).append(_peers(row))
        else:
            kinds.setdefault("training", []).append(_model(row))
    breakdown = [{**row, "work": row["name"]} for row in record["breakdown"] if "operations" in row]
    if breakdown:
        kinds["profile"] = breakdown
    expanded = {f"{device}/{kind}.json": {**shared, "rows": rows} for kind, rows in kinds.items()}
    if expanded:  # what failed is told once, with the models or whatever there is
        name = f"{device}/models.json"
        expanded[name if name in expanded else next(iter(expanded))]["failed"] = [
            f"{row['name']}, {row['dtype']}: {row['failed']}"
            for row in (*record["rows"], *record["breakdown"])
            if "failed" in row
        ]
    return expanded


def _ratio(ratio: Row) -> Row:
    return {"ratio": ratio["ratio"], "ratio_p20": ratio["p20"], "ratio_p80": ratio["p80"]}


def _operation(row: Row) -> Row:
    eager, ours = row["sides"]["eager"], row["sides"]["sdfast"]
    return {
        **row, "eager_ms": eager["ms"], "sdfast_ms": ours["ms"], **_ratio(row["ratios"]["eager"]),
        "eager_gflop_per_s": row["flops"] / eager["ms"] / 1e6,
    }  # fmt: skip


def _model(row: Row) -> Row:
    """Beside eager in the faster of the formats that were measured."""
    formats = {"eager": "channels_last", "eager-contiguous": "contiguous"}
    best = min((name for name in formats if name in row["sides"]), key=lambda n: row["sides"][n]["ms"])
    return {
        "work": row["name"], "dtype": row["dtype"], "eager_layout": formats[best],
        "best_eager_ms": row["sides"][best]["ms"], "sdfast_ms": row["sides"]["sdfast"]["ms"],
        **_ratio(row["ratios"][best]),
    }  # fmt: skip


def _peers(row: Row) -> Row:
    sides = {
        name: {**side, "ready_seconds": side["first_ms"] / 1e3} for name, side in row["sides"].items()
    }  # fmt: skip
    ours = sides.pop("sdfast")
    return {
        "work": row["name"], "dtype": row["dtype"], "weight_bytes": row["weight_bytes"], "sdfast": ours,
        "peers": {name: {**side, **_ratio(row["ratios"][name])} for name, side in sides.items()},
        "skipped": row["skipped"],
    }  # fmt: skip
