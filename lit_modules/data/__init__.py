"""Lightning data modules."""

from memzoo.lit_modules.data.book_stream import BookChunks, BookStreamData
from memzoo.lit_modules.data.class_stream import ClassStreamData
from memzoo.lit_modules.data.clustered_text import ClusteredTextData
from memzoo.lit_modules.data.fact_rows import Fact, Question, read_facts
from memzoo.lit_modules.data.fact_task import FactTask
from memzoo.lit_modules.data.facts import FactData
from memzoo.lit_modules.data.leaf_rows import LeafRows, TreeBucketedSampler
from memzoo.lit_modules.data.phone_book import PhoneBookData, PhoneBookTask
from memzoo.lit_modules.data.recall import RecallData, RecallTask
from memzoo.lit_modules.data.relabel import Relabel, RelabelData
from memzoo.lit_modules.data.text import TextData
from memzoo.lit_modules.data.topic_task import TopicTask
from memzoo.lit_modules.data.topics import TopicData

__all__ = [
    "BookChunks",
    "BookStreamData",
    "ClassStreamData",
    "ClusteredTextData",
    "Fact",
    "FactData",
    "FactTask",
    "LeafRows",
    "PhoneBookData",
    "PhoneBookTask",
    "Question",
    "RecallData",
    "RecallTask",
    "Relabel",
    "RelabelData",
    "TextData",
    "TopicData",
    "TopicTask",
    "TreeBucketedSampler",
    "read_facts",
]
