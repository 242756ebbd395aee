"""Which bytes does a token id stand for?"""

from diglot.vocabulary.encoder import ByteEncoder, Encoded, Speller
from diglot.vocabulary.loading import load_tokenizer
from diglot.vocabulary.projection import Projection
from diglot.vocabulary.table import Vocabulary

__all__ = ["ByteEncoder", "Encoded", "Projection", "Speller", "Vocabulary", "load_tokenizer"]
