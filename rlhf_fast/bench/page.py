"""The results of a folder as one HTML file, in the style of the runs' reports, with its pictures inside."""

from pathlib import Path

from rlhf_fast.bench.record import cell, known, path_of, shown
from rlhf_fast.report import Table, write_report


def write(folder: Path, devices: list[str], facts: dict[str, str], compared: list[dict], remark: str = "") -> Path:
    """Write ``folder``/report.html of every op whose results it holds and return its path.

    ``facts`` describe machine and versions; ``compared`` are the rows of ``compare.changes``, with their ``remark``.
    """
    tables, goals = [], []
    if compared:
        tables.append(changes(compared, remark))
    for device in devices:
        found = known(folder, device)
        for op, record in found.items():
            if isinstance(record, dict):
                tables += of_op(op, found["device"], record, path_of(folder, device, f"-{op}.png"))
                goals += [(found["device"], g["goal"], g["what"], g["measured"], g["bound"]) for g in record["goals"]]
    header = ("device", "goal", "what", "measured", "goal's bound")
    appendix = [Table("The project's own goals", header, goals)] if goals else []
    summary = (
        "Each op against its peers, which take turns with it in one run. Medians; figures to rely on are the ratios.\n"
        "% copy is the share of the bandwidth that a copy reaches on this machine in the same run."
    )
    environment = ", ".join(f"{name} {value}" for name, value in facts.items())
    return write_report(
        folder, title="rlhf-fast bench", summary=summary, tables=tables, curves=[], samples=[], appendix=appendix,
        environment=environment,
    )  # fmt: skip


def changes(compared: list[dict], remark: str) -> Table:
    """The comparison with earlier results."""
    header = [name for name in compared[0] if name != "slower"]
    rows = [[*(cell(row[name]) for name in header), not row["slower"]] for row in compared]
    return Table("Against earlier results", [*header, "as fast"], rows, note=remark)


def of_op(op: str, device: str, record: dict, picture: Path) -> list[Table]:
    """The rows of ``op``, and how many times our time each of the others takes."""
    rows = shown(record["rows"])
    columns = list(dict.fromkeys(column for row in rows for column in row))
    versions = ", ".join(f"{name} {value}" for name, value in record["versions"].items())
    left = "".join(f" Left out: {name}: {why}." for name, why in record["notes"].items())
    note = f"{record['remark']} Measured with {versions}.{left}"
    measured = [[cell(row.get(column)) for column in columns] for row in rows]
    names = list(dict.fromkeys(name for row in record["rows"] for name in row["ratios"]))
    ratios = [[row["case"], *(cell(row["ratios"].get(name)) for name in names)] for row in record["rows"]]
    found = [Table(f"{op} on {device}", columns, measured, note)]
    if names:
        drawn = picture if picture.exists() else None
        found.append(Table(f"{op}: their time over ours", ["case", *names], ratios, picture=drawn))
    return found
