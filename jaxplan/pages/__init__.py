"""Room `pages`: a plan as one HTML page, and tables for notebooks.

    nouns.py     what a page shows, without HTML
    gather.py    that, from a plan
    points.py    plans at several values, for its slider
    saved.py     that, from a saved plan alone
    collapse.py  layers that look alike become one block
    html.py      the page
    page.css, page.js   its style sheet and its script
    notebook.py  tables for notebooks
"""

from jaxplan.pages.gather import picture_of
from jaxplan.pages.html import page
from jaxplan.pages.notebook import fragment, plan_table
from jaxplan.pages.nouns import Picture, SweepView
from jaxplan.pages.points import auto_sweep, sweep_view
from jaxplan.pages.saved import picture_of_saved

__all__ = ["Picture", "SweepView", "auto_sweep", "fragment", "page", "picture_of", "picture_of_saved", "plan_table", "sweep_view"]
