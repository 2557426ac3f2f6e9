"""The log of a server: JSON, one line each."""

import datetime
import json
import logging


class JsonLines(logging.Formatter):
    """One JSON object a line: time, level, event, and the record's ``facts``."""

    def format(self, record: logging.LogRecord) -> str:
        """Return a record's line."""
        when = datetime.datetime.fromtimestamp(record.created, datetime.UTC).isoformat(timespec="milliseconds")
        line = {"time": when, "level": record.levelname.lower(), "event": record.getMessage()}
        line |= getattr(record, "facts", {})
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)
