// Everything that a generated kernel uses.
#pragma once
#include "tiles.h"
#include "pairs.h"
#include "pages.h"
#include "lists.h"
#include "select.h"
#include "scaled.h"
