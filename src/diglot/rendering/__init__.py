"""What does each model read for one conversation?"""

from diglot.rendering.assemble import truncate
from diglot.rendering.renderer import Renderer
from diglot.rendering.types import Conversation, Rendered, Role, Score

__all__ = ["Conversation", "Rendered", "Renderer", "Role", "Score", "truncate"]
