"""Files of preferences, read: every row in its kind, or named."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from jaxpref.data.files import _columns, _layouts
from jaxpref.data.files._kinds import NEEDS, Bad, Found, Kind, TextPair
from jaxpref.data.files._rows import DataError, Row, RowError, rows


def read(
    source: str | Path | Iterable[Row],
    kind: Kind = "pairs",
    *,
    bad: Bad = "error",
    columns: Mapping[str, str | None] | None = None,
    needs: Sequence[str] = (),
) -> Found:
    """The rows of a file as pairs, single examples or lists; `read_pairs` tells the layouts.

    Args:
      source: a file or ``"tfds:NAME"``, see `rows`; or the place and the content of each row.
      kind: ``"pairs"`` gives `TextPair`, ``"examples"`` `TextExample` of the columns ``prompt``,
        ``completion`` and ``label``, ``"lists"`` `TextList` of ``prompt`` and ``responses``.
      bad: what happens to a row that cannot be used, whatever is wrong with it alone: ``"error"``
        raises, ``"drop"`` leaves it out and keeps the reason. A file that cannot be read raises.
      columns: names in the file by this package's: ``{"chosen": "good"}`` reads ``good`` as
        ``chosen``. None as a name leaves a column unread.
      needs: what each row must give beside texts, of `NEEDS`. Columns are: of pairs, for
        ``rewards`` ``chosen_score`` and ``rejected_score`` (or ``score_chosen``, or ``_reward``, or
        ``_rating``), ``win_probability`` of the chosen (or ``chosen_probs_win`` and
        ``chosen_probs_lose``), ``is_tie`` or ``tie``; of examples, ``label`` for ``desirable``; of
        lists, for ``rewards`` ``rewards``, ``scores`` or ``ranks``.

    Returns:
      The rows and the faults of those that were left out.

    Raises:
      RowError: a row that cannot be used, under ``"error"``.
      DataError: a file that cannot be read, a name of `columns` that no row has, or no row that
        can be used.
      ValueError: another `kind`, `bad`, name of a column or need.

    >>> kto = {"prompt": "1+1=", "completion": "2", "label": True}
    >>> read([("here", kto)], "examples", needs=["desirable"]).rows[0].desirable
    True
    """
    columns = {} if columns is None else columns
    if kind not in NEEDS:
        raise ValueError(f"kind is {kind!r}, expected one of {', '.join(map(repr, NEEDS))}")
    if bad not in ("error", "drop"):
        raise ValueError(f"bad is {bad!r}, expected 'error' or 'drop'")
    for name, known in [
        *((n, _columns.NAMES) for n in columns),
        *((n, NEEDS[kind]) for n in needs),
    ]:
        if name not in known:
            what = "needs" if known is NEEDS[kind] else "columns"
            raise ValueError(f"{what} names {name!r}, expected some of {', '.join(known)}")
    make = {"pairs": _layouts.pair, "examples": _layouts.example, "lists": _layouts.listed}[kind]
    found, faults, seen = [], [], set()
    content = rows(source) if isinstance(source, str | Path) else source
    for number, (place, row) in enumerate(content):
        try:
            known = _columns.renamed(row, columns, seen)
            found.append(make(known, needs, columns)._replace(place=place, row=number))
        except RowError as fault:
            if bad == "error":
                raise RowError(f"{place}: {fault}") from None
            faults.append(f"{place}: {fault}")
    for ours, name in columns.items():
        if name is not None and name not in seen:
            where = f"{source}: " if isinstance(source, str | Path) else ""
            raise DataError(f"{where}no row has the column {name!r}, given for {ours!r}")
    if not found:
        first = f"; the first: {faults[0]}" if faults else ""
        raise DataError(f"no row is left with bad='drop'{first}")
    return Found(found, faults)


def read_pairs(
    path: str | Path,
    *,
    bad: Bad = "error",
    columns: Mapping[str, str | None] | None = None,
    needs: Sequence[str] = (),
) -> list[TextPair]:
    r"""The pairs of a file with the columns ``chosen`` and ``rejected``.

    The rows have one of these layouts.

    - ``prompt`` and two responses. Each is a text; a prompt may also be a list of chat messages
      (objects with ``role`` and ``content``), and a response a list of one message of the
      assistant.
    - Two conversations, lists of chat messages as in UltraFeedback-binarized. The last message,
      the assistant's, is the response; those before it are the prompt, and the same in both. A
      text in the column ``prompt`` is then not read, messages in it must be those.
    - Two transcripts as in HH-RLHF, without ``prompt``, of turns that begin with
      ``"\n\nHuman:"`` and ``"\n\nAssistant:"``. The prompt ends with the last assistant's
      ``"\n\nAssistant:"`` before the first character in which the two differ. A response is all
      that follows, with its leading space, and with further turns where transcripts part early.

    To a prompt of messages belong the columns ``system``, ``tools`` and ``chat_template_kwargs``;
    with a prompt of text, or with pictures or sound, a row is refused. Other columns are not read.

    Args:
      path: the file. One that ends in ``.gz`` is unpacked, ``.parquet`` or ``.pq`` is Parquet,
        ``.csv`` or ``.tsv`` a table; ``"tfds:NAME"`` is a data set of `jaxpref.data.builders`.
      bad: what happens to a row that cannot be used: ``"error"`` raises, ``"drop"`` leaves it out.
      columns: names in the file by this package's, see `read`.
      needs: what each row must give beside texts, see `read`.

    Returns:
      The pairs in the file's order, each with its place and its row.

    Raises:
      RowError: under ``"error"`` a row without two different responses, with a missing column, or
        with another type in one that is read.
      DataError: a file that cannot be read or is empty, or no row that can be used.

    References:
      Bai et al. 2022, https://arxiv.org/abs/2204.05862 (HH-RLHF, its files' format)
      Tunstall et al. 2023, https://arxiv.org/abs/2310.16944 (UltraFeedback-binarized)
    """
    return read(path, bad=bad, columns=columns, needs=needs).rows


def pairs_of(found: Iterable[Row], *, bad: Bad = "error") -> list[TextPair]:
    """The pairs of rows that were read already, see `read_pairs`.

    Args:
      found: the place and the content of each row, all of them and in order.
      bad: what happens to a row that cannot be used.

    Returns:
      The pairs in the same order.

    Raises:
      DataError: as `read_pairs`.

    >>> pairs_of([("here", {"prompt": "1+1=", "chosen": "2", "rejected": "3"})])[0][:5]
    ('1+1=', '2', '3', 'here', 0)
    """
    return read(found, bad=bad).rows
