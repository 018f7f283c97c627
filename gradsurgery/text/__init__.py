"""What people read: tables, messages and warnings; and the old names of what has moved."""

from gradsurgery.text.messages import calling_frame as calling_frame
from gradsurgery.text.messages import spelling as spelling
from gradsurgery.text.messages import spellings as spellings
from gradsurgery.text.messages import suggestion as suggestion
from gradsurgery.text.messages import warn as warn
from gradsurgery.text.tables import grid as grid
from gradsurgery.text.tables import number as number
from gradsurgery.text.tables import terminal_width as terminal_width
from gradsurgery.text.tables import wrapped as wrapped
