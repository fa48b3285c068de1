"""Where readings and alerts go: what the standard library can do. The rest comes through entry points."""

from gradmon.sinks.background import Background as Background
from gradmon.sinks.base import EndAware as EndAware
from gradmon.sinks.base import InfoAware as InfoAware
from gradmon.sinks.base import RunAware as RunAware
from gradmon.sinks.base import Sink as Sink
from gradmon.sinks.email import EmailSink as EmailSink
from gradmon.sinks.jsonl import JsonlSink as JsonlSink
from gradmon.sinks.jsonl import RunLog as RunLog
from gradmon.sinks.jsonl import read_jsonl as read_jsonl
from gradmon.sinks.jsonl import read_runs as read_runs
from gradmon.sinks.log import LogSink as LogSink
from gradmon.sinks.memory import MemorySink as MemorySink
from gradmon.sinks.spec import make_sink as make_sink
from gradmon.sinks.webhook import WebhookSink as WebhookSink
