"""More than one process: the ranks that train one model, each on its part of the batch, measured as one."""

from __future__ import annotations

from gradmon.team.ranks import Group as Group
from gradmon.team.ranks import Ranks as Ranks
from gradmon.team.ranks import find_ranks as find_ranks
from gradmon.team.ranks import running as running
from gradmon.team.sharded import Unsharded as Unsharded
from gradmon.team.sharded import gathered as gathered
from gradmon.team.sharded import is_replicated as is_replicated
from gradmon.team.sharded import is_sharded as is_sharded
from gradmon.team.sharded import passes_talk as passes_talk
from gradmon.team.sharded import without_talk as without_talk
from gradmon.team.team import RankError as RankError
from gradmon.team.team import Team as Team
