"""What the processes of one training run tell each other in a step. One process is a communicator like any other."""

from gradsurgery.communication.alone import ALONE as ALONE
from gradsurgery.communication.alone import Communicator as Communicator
from gradsurgery.communication.alone import host as host
from gradsurgery.communication.processes import Processes as Processes
from gradsurgery.communication.processes import ShardedProcesses as ShardedProcesses
from gradsurgery.communication.processes import held as held
from gradsurgery.communication.processes import hold as hold
