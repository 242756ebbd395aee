"""What does each model read for one conversation?"""

from diglot.rendering.assemble import truncate
from diglot.rendering.renderer import Renderer
from diglot.rendering.reply import message_reply, plain_reply, text_reply
from diglot.rendering.types import Conversation, Rendered, Reply, Role, Score, Slot

__all__ = [
    "Conversation",
    "Rendered",
    "Renderer",
    "Reply",
    "Role",
    "Score",
    "Slot",
    "message_reply",
    "plain_reply",
    "text_reply",
    "truncate",
]
