"""Files of preferences: read JSON lines, tables, HH-RLHF and Parquet, and write a part back.

One line of error names the file, the row and the fault.
"""

from jaxpref.data.files._each import each as each
from jaxpref.data.files._filter import check_filter as check_filter
from jaxpref.data.files._filter import filter_file as filter_file
from jaxpref.data.files._kinds import NEEDS as NEEDS
from jaxpref.data.files._kinds import Found as Found
from jaxpref.data.files._kinds import TextExample as TextExample
from jaxpref.data.files._kinds import TextList as TextList
from jaxpref.data.files._kinds import TextPair as TextPair
from jaxpref.data.files._kinds import TextRow as TextRow
from jaxpref.data.files._messages import Messages as Messages
from jaxpref.data.files._messages import Response as Response
from jaxpref.data.files._messages import checked as checked
from jaxpref.data.files._messages import joined as joined
from jaxpref.data.files._pairs import pairs_of as pairs_of
from jaxpref.data.files._pairs import read as read
from jaxpref.data.files._pairs import read_pairs as read_pairs
from jaxpref.data.files._rows import DataError as DataError
from jaxpref.data.files._rows import RowError as RowError
from jaxpref.data.files._rows import check_text as check_text
from jaxpref.data.files._rows import csv_rows as csv_rows
from jaxpref.data.files._rows import json_lines as json_lines
from jaxpref.data.files._rows import rows as rows
