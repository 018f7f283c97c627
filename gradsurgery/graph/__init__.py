"""What an autograd graph tells before anything is differentiated.

``reach.py`` says which losses reach which leaves, ``footprints.py`` which reach which entries of a joined tensor,
``hooks.py`` whether functions look at gradients on the way, and ``torch_private.py`` has all that is read of torch
beyond its public interface.
"""

from gradsurgery.graph.hooks import is_hooked as is_hooked
from gradsurgery.graph.reach import Front as Front
from gradsurgery.graph.reach import Graph as Graph
from gradsurgery.graph.reach import Nodes as Nodes
from gradsurgery.graph.reach import Root as Root
from gradsurgery.graph.reach import Stage as Stage
from gradsurgery.graph.reach import Start as Start
from gradsurgery.graph.reach import Together as Together
from gradsurgery.graph.reach import deepest as deepest
from gradsurgery.graph.reach import inputs_first as inputs_first
from gradsurgery.graph.reach import is_users as is_users
from gradsurgery.graph.reach import origins as origins
from gradsurgery.graph.reach import reaching as reaching
from gradsurgery.graph.reach import undecided as undecided
from gradsurgery.graph.reach import walk as walk
